from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.core.errors import ConfigError
from fedward.core.site import load_site
from fedward.core.study import load_study, parse_study

STUDY = """\
[study]
name = "heart"
task = "heart-disease"
rounds = 3

[model]
name = "logistic"

[training]
local_steps = 1
sample_rate = 0.3
learning_rate = 1

[privacy]
mode = "local"
epsilon = 4.0

[aggregation]
min_sites = 3
"""
SITE = """\
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


def test_the_example_study_reads() -> None:
    example = Path(__file__).parent.parent / "examples" / "heart-disease.toml"

    study = load_study(example)

    assert study.privacy.epsilon == 4.0
    assert study.training.sample_rate == 0.3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epsilon = 4.0", "epsilonn = 4.0", r"study:16: \[privacy\] epsilonn .* mean `epsilon`\?"),
        ("epsilon = 4.0", "", r"study:14: \[privacy\] mode = \"local\" needs epsilon"),
        ("epsilon = 4.0", "epsilon = 'four'", r"study:16: \[privacy\] epsilon = 'four' .* number"),
        (
            "rounds = 3",
            "rounds = 0",
            r"study:4: \[study\] rounds = 0 .* greater than or equal to 1",
        ),
        ("rounds = 3", "", r"study:1: \[study\] rounds is missing"),
        ('mode = "local"', 'mode = "none"', r"\[privacy\] .*acknowledge = \"no privacy\""),
        ("local_steps = 1", "", r"\[training\] needs exactly one of `local_epochs`"),
        ("min_sites = 3", "min_sites = 2", r"\[aggregation\] .*3 or more"),
        ("[privacy]", "[privacy", r"study:14: is not valid TOML"),
        ("[model]", "[modell]", r"study:6: \[modell\] is not a known key; did you mean `model`"),
    ],
)
def test_a_wrong_study_is_explained_with_line_and_key(old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_study(STUDY.replace(old, new))


def test_the_hash_covers_what_a_site_agrees_to_and_nothing_else() -> None:
    study = parse_study(STUDY)
    elsewhere = parse_study(STUDY + '\n[publish]\nregistry = "other"\n')
    weaker = parse_study(STUDY.replace("epsilon = 4.0", "epsilon = 5.0"))

    assert study.hash == elsewhere.hash
    assert study.hash != weaker.hash


def test_a_study_survives_its_own_json() -> None:
    study = parse_study(STUDY)

    again = type(study).model_validate(study.agreed())

    assert again.hash == study.hash


def test_a_conflict_between_sections_names_each_key_once() -> None:
    attack = '[simulation]\nmalicious = { attack = "ipm" }\n'

    with pytest.raises(ConfigError, match=r'study:20: \[simulation\] malicious attack = "ipm" is'):
        parse_study(STUDY + attack)


@given(st.text())
def test_no_text_gets_past_the_reader_but_a_study(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_study(text)


def test_a_site_is_safe_by_default(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)

    site = load_site(tmp_path / "site.toml")

    assert site.policy.require_secure_aggregation
    assert not site.policy.allow_no_privacy
    assert not site.site.simulated


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('patient_id = "pid"', "", r"site.toml:4: \[data\] source = \"csv\" needs"),
        ('"st-elsewhere"', '"St. Elsewhere"', r"site.toml:2: \[site\] name"),
        ("max_epsilon", "max_eps", r"site.toml:12: \[policy\] max_eps .* mean `max_epsilon`"),
        ("public_size = 300", "", r"site.toml:4: \[data\] public_size is missing"),
    ],
)
def test_a_wrong_site_is_explained(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "site.toml").write_text(SITE.replace(old, new))

    with pytest.raises(ConfigError, match=says):
        load_site(tmp_path / "site.toml")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_study(tmp_path / "nothing.toml")
