"""The pages in a headless Chromium, as a person uses it: by mouse, by keys alone, in two
tabs, through a reload and a server that is killed. What was clicked is in the file, once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.config import visible
from nanorlhf.tools import inspect
from tests.human.conftest import records, write_samples
from tests.tools.test_evaluate import make_gpt, save

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"laptop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[test]'")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Server:
    """`label` in a process of its own, which can be killed and started again at its port."""

    def __init__(self, folder, kind, n, models=("a", "a"), *flags):
        samples = write_samples(folder / "samples.jsonl", n, models)
        self.to, self.port, self.flags = folder / "judged.jsonl", "0", [*flags]
        self.command = [sys.executable, "-m", "nanorlhf", "label", str(samples), "--to"]
        self.command += [str(self.to), "--feedback", kind]
        self.start()

    def start(self):
        command = [*self.command, *self.flags, "--port", self.port]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=-1, text=True)
        self.address = self.process.stdout.readline().strip()
        self.port = self.address.rstrip("/").rpartition(":")[2]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(*args):
        started.append(Server(tmp_path, *args))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def open_page(browser, server, name="ann", **how):
    page = browser.new_page(**how)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("dialog", lambda dialog: page.wrong.append("a dialog"))
    page.goto(f"{server.address}?labeler={name}")
    page.wait_for_selector("article")
    page.wait_for_timeout(350)
    return page


def wait_for(page, n):
    """Until so many questions are answered, and as long as a person needs at least for the next."""
    page.wait_for_function(
        "n => document.getElementById('status').textContent.startsWith(n + ' ')", arg=n
    )
    page.wait_for_timeout(350)


def shown(page):
    return page.locator("article .text").all_inner_texts()


def test_thirty_comparisons_with_a_reload_two_tabs_and_a_kill(browser, serve):
    server = serve("comparisons", 30)
    page, wanted = open_page(browser, server), []
    for i in range(10):  # each button twice, faster and slower than the page
        wanted.append((shown(page), [1, 2] if i % 2 else [2, 1]))
        page.locator("article button").nth(0 if i % 2 else 1).dblclick(delay=10 * i)
        wait_for(page, i + 1)
    page.reload()
    wait_for(page, 10)
    assert [r["ranks"] for r in records(server.to)] == [ranks for _, ranks in wanted]
    other = open_page(browser, server)
    for i in range(10, 20):  # two tabs, each of which shows what the other has answered
        tab = (page, other)[i % 2]
        texts = shown(tab)
        tab.keyboard.press("1")
        if (texts, [1, 2]) in wanted:  # answered in the other tab: refused, and the next is shown
            wait_for(tab, len(wanted))
            texts = shown(tab)
            tab.keyboard.press("1")
        wanted.append((texts, [1, 2]))
        wait_for(tab, len(wanted))
    page.reload()
    wait_for(page, 20)
    server.kill()
    page.keyboard.press("2")
    page.get_by_text("No answer from the server").wait_for()
    server.start()
    for _ in range(20, 30):
        wanted.append((shown(page), [2, 1]))
        page.keyboard.press("2")
        wait_for(page, len(wanted))
    assert "Nothing is left" in page.inner_text("#title")
    found = [(r["completions"], r["ranks"]) for r in records(server.to)]
    assert found == wanted and len(found) == 30 and not page.wrong + other.wrong


def test_all_four_kinds_by_keys_alone(browser, tmp_path_factory):
    keys = {
        "comparisons": (["t"], {"ranks": [1, 1]}),
        "rankings": (["3", "1", "=", "4", "2", "Enter"], {"ranks": [2, 4, 1, 2]}),
        "ratings": (["4", "0", "ArrowUp", "5", "3", "2", "Enter"], [4, 5, 3, 2]),
        "thumbs": (["l", "d", "d", "l", "Enter"], [True, False, False, True]),
    }
    for kind, (pressed, wanted) in keys.items():
        n = 2 if kind == "comparisons" else 4
        server = Server(tmp_path_factory.mktemp(kind), kind, 2, ("a",) * n)
        try:
            page = open_page(browser, server)
            page.keyboard.press("s")  # skip, and take that back
            wait_for(page, 1)
            page.keyboard.press("u")
            wait_for(page, 0)
            texts = shown(page)
            for key in pressed:
                page.keyboard.press(key)
            wait_for(page, 1)
            found = [r for r in records(server.to) if not {"skipped", "undone"} & r.keys()]
            if "ranks" in found[0]:
                assert found[0]["completions"] == texts and found[0]["ranks"] == wanted["ranks"]
            else:
                assert [r["completion"] for r in found] == texts
                assert [r.get("rating", r.get("label")) for r in found] == wanted
            assert not page.wrong
        finally:
            server.kill()


def test_all_four_kinds_by_mouse(browser, tmp_path_factory):
    clicks = {
        "comparisons": (["Reply 2 is better"], [2, 1]),
        "rankings": (["2/Next best 2", "1/Next best 1", "Done"], [2, 1]),
        "ratings": (["1/5 of 5 stars", "2/0 of 5 stars", "Done"], [5, 0]),
        "thumbs": (["1/Dislike", "2/Like", "Done"], [False, True]),
    }
    for kind, (labels, wanted) in clicks.items():
        server = Server(tmp_path_factory.mktemp(kind), kind, 1, ("a", "a"))
        try:
            page = open_page(browser, server)
            for label in labels:
                card, _, name = label.rpartition("/")
                inside = page.locator("article").nth(int(card) - 1) if card else page
                inside.get_by_role("button", name=name, exact=bool(card)).click()
            wait_for(page, 1)
            found = records(server.to)
            ranks = found[0].get("ranks")
            assert (ranks or [r.get("rating", r.get("label")) for r in found]) == wanted
            page.get_by_role("button", name="Undo").click()
            wait_for(page, 0)
            assert not page.wrong
        finally:
            server.kill()


def test_texts_are_text_and_a_long_prompt_scrolls(browser, tmp_path):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> ]]> &amp; "
    samples = tmp_path / "evil.jsonl"
    row = {"prompt": evil + "long " * 5000, "responses": [evil + "1", evil + "2"]}
    samples.write_text(json.dumps(row) + "\n")
    server = Server(tmp_path, "comparisons", 1)
    server.kill()
    server.command[4] = str(samples)
    server.start()
    try:
        page = open_page(browser, server)
        assert sorted(shown(page)) == [evil.strip() + " 1", evil.strip() + " 2"]
        assert page.locator("main b, main img, main script").count() == 0
        box = page.locator("#prompt")
        assert box.evaluate("x => x.scrollHeight > x.clientHeight && x.textContent.length > 25000")
        assert box.evaluate("x => x.clientHeight < innerHeight / 2") and not page.wrong
    finally:
        server.kill()


def test_text_runs_as_its_letters_do_and_hides_nothing(browser, tmp_path):
    """Arabic from right to left, a direction that is turned stays in its answer, codes are seen."""
    rows = [
        {"prompt": "اكتب", "responses": ["البحر واسع (wide)!", "The sea, البحر 12."]},
        {"prompt": "Codes", "responses": ["\x1b[2Ka\x00", "\u202eback to front"]},
    ]
    server = Server(tmp_path, "rankings", 1)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.kill()
    server.start()
    try:
        page, seen = open_page(browser, server), {}
        direction = "x => getComputedStyle(x).direction"
        for _ in rows:
            for text in page.locator("#prompt .text, article .text").all():
                seen[text.inner_text()] = text.evaluate(direction)
            assert page.locator("article h2").first.evaluate(direction) == "ltr"
            page.keyboard.press("s")
            page.wait_for_timeout(400)
        assert seen == {
            "اكتب": "rtl",
            "البحر واسع (wide)!": "rtl",
            "The sea, البحر 12.": "ltr",
            "Codes": "ltr",
            "\\x1b[2Ka\\x00": "ltr",
            "\u202eback to front": "ltr",
        }
    finally:
        server.kill()


def test_on_a_phone_everything_is_at_hand_and_no_key_is_named(browser, tmp_path):
    server = Server(tmp_path, "comparisons", 2)
    row = {"prompt": "p", "responses": ["long " * 900, "longer " * 900]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    server.kill()
    server.start()
    try:
        page = open_page(browser, server, viewport={"width": 390, "height": 844}, has_touch=True)
        for label in ("Tie", "Skip", "Undo"):
            box = page.get_by_role("button", name=label).bounding_box()
            assert 0 <= box["y"] and box["y"] + box["height"] <= 844, label
        assert page.locator("kbd").count() and not page.locator("kbd:visible").count()
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert "better is the one that you would" in page.inner_text("#guidelines")
        page.get_by_role("button", name="Tie").click()
        wait_for(page, 1)
        page.get_by_role("button", name="Undo").click()
        wait_for(page, 0)
        assert page.inner_text("#status").endswith("Taken back: a tie")
        page.keyboard.press("1")
        wait_for(page, 1)
        assert "Taken back" not in page.inner_text("#status") and not page.wrong
        laptop = open_page(browser, server, "bob")
        assert laptop.locator("kbd:visible").count()
    finally:
        server.kill()


def test_a_second_click_undoes_nothing_more_and_keys_keep_their_meaning(browser, tmp_path):
    (tmp_path / "guide.txt").write_text("be kind")
    row = {"prompt": "long " * 3000, "responses": ["a", "b"]}
    server = Server(tmp_path, "ratings", 3, ("a", "a"), "--guidelines", str(tmp_path / "guide.txt"))
    try:
        page = open_page(browser, server)
        for n in (1, 2):
            for key in ("5", "1", "Enter"):
                page.keyboard.press(key)
            wait_for(page, n)
        page.get_by_role("button", name="Undo").dblclick()
        wait_for(page, 1)
        for key in ("5", "1"):
            page.keyboard.press(key)
        page.locator("summary").focus()
        page.keyboard.press("Enter")  # closes the guidelines, and submits nothing
        page.wait_for_timeout(350)
        assert not page.locator("#guidelines").is_visible() and len(records(server.to)) == 5
    finally:
        server.kill()
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    server.start()
    try:
        page = open_page(browser, server)
        page.locator("#prompt").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_timeout(350)
        assert page.locator("#prompt").evaluate("x => x.scrollTop") > 0
        assert page.locator(".current").get_attribute("aria-label") == "Reply 1"
    finally:
        server.kill()


def test_a_name_is_asked_for_once(browser, serve):
    server = serve("comparisons", 2)
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.address)
    page.keyboard.type("Zoë")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    page.wait_for_timeout(350)
    page.keyboard.press("1")
    wait_for(page, 1)
    assert records(server.to)[0]["labeler"] == "Zoë"
    page.reload()
    assert page.input_value("#name") == "Zoë"


def test_the_page_is_usable_with_a_screen_reader_and_its_focus_stays(browser, tmp_path_factory):
    """No fault that axe-core finds, in either colour scheme, at any of the kinds."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="'.[test]'").Axe()
    for kind in ("comparisons", "rankings", "ratings", "thumbs"):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "guide.txt").write_text("Prefer the kinder reply.")
        server = Server(folder, kind, 2, ("a", "a"), "--guidelines", str(folder / "guide.txt"))
        try:
            for scheme in ("light", "dark"):
                page = open_page(browser, server, color_scheme=scheme)
                found = axe.run(page).response["violations"]
                assert not [(v["id"], v["nodes"][0]["html"]) for v in found], (kind, scheme)
            page.keyboard.press("Tab")
            if kind in ("ratings", "thumbs"):
                button = page.locator("article button").nth(1)
                button.focus()
                page.keyboard.press("Enter")
                assert (
                    page.locator("article button")
                    .nth(1)
                    .evaluate("b => b === document.activeElement")
                )
        finally:
            server.kill()


# ---- the chat page -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(address of a chat with two models, the folder of its judgements)."""
    folder = tmp_path_factory.mktemp("chat")
    models = [str(save(folder / f"model_{i}", "sft", make_gpt(i))) for i in range(2)]
    command = [sys.executable, "-m", "nanorlhf", "serve", *models, "--to", f"{folder}/said"]
    command += ["--port", "0", "--max_new_tokens", "20", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, text=True)
    yield process.stdout.readline().strip(), folder
    process.kill()
    process.wait()


def test_a_chat_with_two_models_leaves_what_was_clicked(browser, chat):
    address, folder = chat
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(f"{address}?labeler=ann")
    for n, words in enumerate(("hello", "<b>more</b>"), 1):
        page.locator("#words").fill(words)
        page.keyboard.press("Enter")
        better = page.get_by_role("button", name="This one is better")
        better.nth(2 * n - 1).wait_for()
        replies = page.locator("article .text").all_text_contents()[-2:]
        better.nth(2 * n - 1).click()
        page.get_by_role("button", name="Dislike").nth(2 * n - 2).dblclick()
        page.wait_for_function(
            "n => document.querySelectorAll('[aria-pressed=true]').length === 2 * n", arg=n
        )
        record = records(folder / "said-comparisons.jsonl")[-1]
        shown = list(map(visible, record["completions"]))
        assert shown == replies and record["ranks"] == [2, 1]
        thumb = records(folder / "said-thumbs.jsonl")[-1]
        assert visible(thumb["completion"]) == replies[0] and thumb["label"] is False
    first = records(folder / "said-comparisons.jsonl")[0]["completions"][1]
    turns = [(m["role"], m["content"]) for m in record["prompt"]]
    assert turns == [("user", "hello"), ("assistant", first), ("user", "<b>more</b>")]
    page.wait_for_timeout(450)
    better.last.click()  # takes it back
    page.wait_for_function("() => document.querySelectorAll('[aria-pressed=true]').length === 3")
    assert records(folder / "said-comparisons.jsonl")[-1]["undone"]
    assert page.locator("main b").count() == 0 and not page.wrong
    width = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]  # nothing to scroll sideways on a phone


def test_the_chat_takes_a_tie_and_gives_another_answer(browser, chat):
    address, folder = chat
    page = browser.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    page.locator("#name").wait_for()
    assert f"in {folder}/said-thumbs.jsonl and " in page.inner_text("footer")  # before signing in
    page.keyboard.type("tim")
    page.keyboard.press("Enter")
    page.locator("#words").fill("hello")
    page.keyboard.press("Enter")
    again = page.get_by_role("button", name="Another answer")
    for n in (1, 2):
        again.wait_for()
        assert page.locator("article").count() == 2 * n and again.count() == 1
        page.get_by_role("button", name="Tie").last.click()
        page.wait_for_function(
            "n => document.querySelectorAll('[aria-pressed=true]').length === n", arg=n
        )
        replies = page.locator("article .text").all_text_contents()[-2:]
        record = records(folder / "said-comparisons.jsonl")[-1]
        assert record["ranks"] == [1, 1] and record["prompt"] == "hello"
        assert list(map(visible, record["completions"])) == replies
        if n == 1:
            again.click()
            page.wait_for_function("() => document.querySelectorAll('article').length === 4")
            page.get_by_role("button", name="Tie").nth(1).wait_for()
    assert not page.wrong


def test_the_chat_says_what_is_forgotten(browser, tmp_path):
    model = str(save(tmp_path / "model", "sft", make_gpt(1)))
    command = [sys.executable, "-m", "nanorlhf", "serve", model, "--to", f"{tmp_path}/said"]
    command += ["--port", "0", "--max_new_tokens", "8", "--device", "cpu", "--keep_turns", "no"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, text=True)
    try:
        page = browser.new_page()
        page.goto(f"{process.stdout.readline().strip()}?labeler=ann")
        told = page.get_by_text("only your last words were read")
        for n in range(3):
            page.locator("#words").fill(f"words {n}")
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Like", exact=True).nth(n).wait_for()
            assert told.count() == n
        page.get_by_role("button", name="Like", exact=True).last.click()
        page.wait_for_function("() => document.querySelector('[aria-pressed=true]')")
        assert records(tmp_path / "said-thumbs.jsonl")[0]["prompt"] == "words 2"
    finally:
        process.kill()
        process.wait()


def test_the_chat_has_no_fault_that_axe_finds(browser, chat):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="'.[test]'").Axe()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{chat[0]}?labeler=eve")
        page.locator("#words").fill("hi")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Like", exact=True).last.wait_for()
        found = axe.run(page).response["violations"]
        assert not [(v["id"], v["nodes"][0]["html"]) for v in found], scheme


# ---- the inspector -----------------------------------------------------------------------------


def test_the_inspector_colours_orders_and_tells_numbers(browser, tmp_path):
    """A page of made-up answers: what is shown is what is in it."""
    evil = "<img src=x onerror=alert(1)>"
    answer = lambda prompt, kl, score, ended=True: {
        "prompt": prompt,
        "tokens": ["one", evil, "<|endoftext|>"],
        "masked": 4,
        "ended": ended,
        "score": score,
        "gold": None,
        "numbers": {"kl": kl, "entropy": [0.5, 1.25, 0.0]},
    }
    about = {"run": "r", "reference": "s", "reward": "m", "kl_coef": 0.1, "missing_eos_score": -3}
    answers = [answer(evil, [1.0, -2.0, 0.0], 2.0), answer("b", [3.0, 0.5, 0.0], -3.0, ended=False)]
    data = {"about": about, "answers": answers}
    path = tmp_path / "inspect.html"
    path.write_text(inspect.page(data))
    page = browser.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("file", "data")) or page.wrong.append(r.url))
    page.goto(path.as_uri())
    assert page.locator("h2").all_inner_texts() == [evil, "b"]
    assert page.locator(".token").count() == 6 and page.locator(".token.end").count() == 1
    assert "is cut" in page.locator("article").nth(1).inner_text()
    colour = lambda i: page.locator(".token").nth(i).evaluate("x => x.style.background")
    assert "--plus" in colour(0) and "--minus" in colour(1) and "0)" in colour(2)
    page.locator(".token").nth(1).hover()
    assert "kl -2" in page.inner_text("#numbers") and "entropy 1.250" in page.inner_text("#numbers")
    page.keyboard.press("ArrowLeft")
    assert "kl 1" in page.inner_text("#numbers") and "token 1" in page.inner_text("#numbers")
    page.select_option("#colour", "entropy")
    assert "--plus" in colour(1) and page.inner_text("#meaning").startswith("entropy: ")
    page.select_option("#order", "lowest score first")
    assert page.locator("h2").all_inner_texts() == ["b", evil]
    page.select_option("#order", "highest KL first")
    assert page.locator("h2").all_inner_texts() == ["b", evil]
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="'.[test]'").Axe()
    assert not [v["id"] for v in axe.run(page).response["violations"]] and not page.wrong
