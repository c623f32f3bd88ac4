"""Responses of one or several models to the same prompts, as a file: what people are to judge."""

from dataclasses import dataclass

from nanorlhf.config import arg, note
from nanorlhf.data.files import write_records
from nanorlhf.human.samples import SampleConfig, sampled


@dataclass
class Config(SampleConfig):
    """Have models answer prompts, and write prompts and responses to a file for `label`."""

    to: str = arg("out/samples.jsonl", "file to write")


def main(cfg):
    records = sampled(cfg)
    write_records(cfg.to, records)
    note(f"responses to {len(records):,} prompts; python -m nanorlhf label {cfg.to}")
