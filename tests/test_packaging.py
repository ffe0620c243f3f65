import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from studies import NO_PRIVACY, change, write_study

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def test_the_listed_packages_are_those_on_disk() -> None:
    on_disk = set()
    for package, folder in MAPPED.items():
        for path, _, files in os.walk(ROOT / folder):
            if "__init__.py" in files:
                parts = Path(path).relative_to(ROOT / folder).parts
                on_disk.add(".".join([package, *parts]))

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_is_linked_into_the_package() -> None:
    for folder in set(MAPPED.values()) - {"fedward"}:
        assert (ROOT / "fedward" / folder).resolve() == ROOT / folder


def test_nothing_that_is_heavy_is_imported_to_show_help() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fedward.cli import app; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0; "
        "print([m for m in ('torch', 'flwr', 'opacus', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert done.stdout.strip() == "[]"


def test_the_serving_adapter_imports_neither_torch_nor_flower() -> None:
    code = (
        "import sys; import fedward.serving.server; "
        "print([m for m in ('torch', 'flwr', 'opacus', 'sklearn', 'numba') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert done.stdout.strip() == "[]"


def test_nothing_is_compiled_where_no_noise_is_drawn(tmp_path: Path) -> None:
    study = write_study(tmp_path, privacy=NO_PRIVACY, rounds=1)
    code = (
        "import sys; from typer.testing import CliRunner; from fedward.cli import app; "
        f"result = CliRunner().invoke(app, ['simulate', {str(study)!r}, '--json']); "
        "import fedward.privacy.mechanisms.rows, fedward.client.training; "
        "print(result.exit_code, 'numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert done.stdout.strip() == "0 False"


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_private_training_of_a_plain_model_imports_no_opacus(tmp_path: Path, model: str) -> None:
    study = change(write_study(tmp_path, rounds=1), ('"logistic"', f'"{model}"'))
    code = (
        "import sys; from typer.testing import CliRunner; from fedward.cli import app; "
        f"result = CliRunner().invoke(app, ['simulate', {str(study)!r}, '--json']); "
        "print(result.exit_code, 'numba' in sys.modules, 'opacus' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert done.stdout.strip() == "0 True False"
