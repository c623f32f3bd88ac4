"""`make demo` at its full size: it ends, and leaves what the README says it leaves."""

import json
import subprocess
import sys
from pathlib import Path

RUNGS = ["demonstrations", "base", "base_fewshot", "sft", "best_of_4", "best_of_16", "ppo"]
FILES = """gpt/latest gpt/metrics.csv sft/latest sft/metrics.csv sft/demonstrations.jsonl
rm/latest rm/metrics.csv rm/report.json rm/feedback.jsonl ppo/latest ppo/metrics.csv
ladder.json ladder.png""".split()


def test_make_demo_trains_all_stages_and_leaves_the_ladder(clone):
    installed = ["-o", ".venv/installed", f"BIN={Path(sys.executable).parent}"]
    command = ["make", *installed, "demo", "SEED=1"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert said.count("checks: ") == 4 and "Traceback" not in said
    out = clone / "out"
    assert not [name for name in FILES if not (out / name).is_file()]
    ladder = json.loads((out / "ladder.json").read_text())
    assert [row["model"] for row in ladder] == RUNGS
    for row in ladder:
        texts = (out / f"ladder/{row['model']}.jsonl").read_text()
        assert len(texts.splitlines()) == row["n_prompts"]
