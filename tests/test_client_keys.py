"""A site's own keys are made once, however many ask for them at the same moment."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from studies import CSV_SITE, write_study

from fedward.client.local_site import LocalSite
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.core.study import load_study

AT_ONCE = 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(CSV_SITE)
    return path


def test_all_who_ask_a_new_site_for_its_identity_get_the_one_that_is_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, turns = Identity.generate_site, itertools.count(1)

    def slowly() -> Identity:
        time.sleep(0.1 * next(turns))  # one after the other is done, and loads what it wrote
        return make()

    monkeypatch.setattr(Identity, "generate_site", slowly)
    sites = [LocalSite(file) for _ in range(AT_ONCE)]
    # Past the lock that a cached property has among threads up to Python 3.11, and not processes.
    ask = vars(LocalSite)["identity"].func
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda site: ask(site).public.pem(), sites))

    assert set(found) == {LocalSite(file).identity.public.pem()}


def test_patients_are_divided_by_one_key_even_if_two_studies_come_at_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(write_study(tmp_path))

    def slowly(path: Path, data: bytes | str, *, mode: int = 0o644, durable: bool = True) -> None:
        time.sleep(0.2)
        write_atomic(path, data, mode=mode, durable=durable)

    monkeypatch.setattr("fedward.client.local_site.write_atomic", slowly)
    sites = [LocalSite(file) for _ in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        keys = list(pool.map(lambda site: site._split_key(study), sites))

    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
