"""Studies and sites for tests."""

from pathlib import Path

CSV_SITE = """\
[site]
name = "st-elsewhere"
[data]
source = "csv"
path = "patients.csv"
patient_id = "pid"
public_size = 300
[policy]
tasks = ["heart-disease"]
max_epsilon = 8.0
"""
STUDY = """\
[study]
name = "heart"
task = "heart-disease"
rounds = {rounds}
seed = {seed}

[model]
name = "logistic"

[training]
local_steps = 1
sample_rate = 0.3
learning_rate = 1.0

[strategy]
average_last = 0.5

[privacy]
{privacy}

[aggregation]
secure = false
min_sites = 3
"""
NO_PRIVACY = 'mode = "none"\nacknowledge = "no privacy"'
EPSILON_4 = 'mode = "local"\nepsilon = 4.0\ndelta = 1e-5\nclip_norm = 1.0'


def write_study(
    folder: Path, *, privacy: str = EPSILON_4, rounds: int = 5, seed: int = 7, extra: str = ""
) -> Path:
    """A study file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.toml"
    file.write_text(STUDY.format(privacy=privacy, rounds=rounds, seed=seed) + extra)
    return file


def change(file: Path, *pairs: tuple[str, str]) -> Path:
    """Replace, in a file, each text that has to be there by another; gives the file."""
    text = file.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file
