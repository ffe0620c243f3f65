"""The command line: a thin layer over the rest.

Every command takes `--json` (one object on standard output, nothing else there), exits 0 on
success, 1 on a failure that it explains, 2 on bad usage. Heavy imports are made inside commands,
so that `fedward --help` stays instant.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedward.cli_registry import registry_app
from fedward.core.errors import FedwardError
from fedward.output import Json
from fedward.output import emit as _emit
from fedward.simulations import startup

app = typer.Typer(
    name="fedward",
    help="Federated, differentially private training across hospitals, audited and published.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ledger_app = typer.Typer(help="A site's privacy ledger.", no_args_is_help=True)
site_app = typer.Typer(help="A hospital's own side.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(site_app, name="site")
app.add_typer(registry_app, name="registry")

StudyFile = Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)]
SiteFile = Annotated[Path, typer.Argument(help="The site file (TOML).", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The run directory.", show_default=False)]


def main() -> None:
    """Run the command line; explain what goes wrong in one or two lines."""
    startup.collect_rarely()
    try:
        app()
    except FedwardError as error:
        if "--json" in sys.argv:
            _emit({"error": {"kind": type(error).__name__, "message": str(error)}})
        else:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def command() -> None:
    """Run the command line in a process of its own, which ends with it."""
    startup.run(main)


@contextlib.contextmanager
def _said_when_stopped(how: str) -> Iterator[None]:
    """End with 130 on Ctrl-C, as typer does, which would say nothing."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; {how}\n")
        raise typer.Exit(130) from None


@app.command()
def demo(
    json_output: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run; by default runs/<time>-demo.")
    ] = None,
) -> None:
    """Train on four real hospitals with and without privacy, publish, and ask the adapter."""
    startup.start()
    from fedward.console import show_demo
    from fedward.simulations.demo import run_demo

    result = run_demo(out, show=None if json_output else show_demo())
    if json_output:
        _emit(result)


@app.command()
def simulate(  # noqa: PLR0917 (options, which typer passes by name)
    study: StudyFile,
    json_output: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; by default runs/<time>-<study>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this directory.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="in-process, ray or loopback; by default the study's.")
    ] = None,
    durable: Annotated[
        bool, typer.Option("--durable", help="Give each simulated site a ledger file of its own.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help='Vary a setting: "privacy.epsilon=1,2,4". May be given several times.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each setting of a sweep.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs of a sweep at a time; by default one a core.")
    ] = None,
) -> None:
    """Run a study with all its sites on this machine, once or over a sweep of settings."""
    if sweep or seeds > 1:
        if runtime not in {None, "in-process"} or durable or resume:
            option = "--durable" if durable else "--resume" if resume else "--runtime"
            hint = "give it in the study's [simulation]"
            if resume:
                hint = "start the same command again: what has ended is not run again"
            raise typer.BadParameter(f"does not go with a sweep; {hint}", param_hint=option)
        folder = out or Path("runs") / f"{study.stem}-sweep"
        _sweep(study, sweep or [], folder, seeds=seeds, workers=workers, json_output=json_output)
        return
    startup.start()
    from fedward.console import follow, print_result
    from fedward.core.run import new_run_path
    from fedward.core.study import load_study
    from fedward.simulations.happenings import Happened, in_lines
    from fedward.simulations.report import write_report
    from fedward.simulations.simulate import prepare_run
    from fedward.simulations.simulate import simulate as run_study

    if runtime not in {None, "in-process", "ray", "loopback"}:
        raise typer.BadParameter("choose in-process, ray or loopback", param_hint="--runtime")
    if resume and out:
        raise typer.BadParameter("a run goes on in its own folder", param_hint="--out")
    loaded = load_study(study)
    path = resume or out or new_run_path(Path("runs"), loaded)
    run = prepare_run(study, path, resume=resume is not None)
    with (
        _said_when_stopped(f"the run goes on with --resume {path}"),
        follow(run, rounds=loaded.study.rounds, quiet=json_output),
    ):
        result = run_study(study, run, runtime=runtime, durable=durable)
    write_report(run)
    if json_output:
        _emit(result)
    else:
        events = list(run.events())
        engine = [f"engine: {e['engine']} ({e['why']})" for e in events if e["event"] == "engine"]
        print_result(result, [*engine[-1:], *in_lines(Happened.of(events))])


def _sweep(
    study: Path, axes: list[str], out: Path, *, seeds: int, workers: int | None, json_output: bool
) -> None:
    import os

    from fedward.console import print_sweep, show_sweep
    from fedward.simulations.sweep import plan_sweep, run_sweep

    points = plan_sweep(study, axes, seeds=seeds)
    at_once = workers or os.cpu_count() or 1
    with (
        _said_when_stopped("the same command goes on with the sweep"),
        show_sweep(len(points), quiet=json_output) as progress,
    ):
        result = run_sweep(study, points, out, workers=at_once, progress=progress)
    if json_output:
        _emit(result)
    else:
        print_sweep(result)
    if result["failed"]:
        raise typer.Exit(1)


@app.command()
def report(run: RunFolder, json_output: Json = False) -> None:
    """Write a run's report.html again."""
    from fedward.core.run import RunDirectory
    from fedward.simulations.report import write_report

    path = write_report(RunDirectory.open(run))
    if json_output:
        _emit({"report": str(path)})
    else:
        sys.stdout.write(f"{path}\n")


@app.command()
def status(run: RunFolder, json_output: Json = False) -> None:
    """Say how far a run is, and what happened to its sites."""
    from fedward.console import print_status
    from fedward.core.run import RunDirectory
    from fedward.core.study import load_study
    from fedward.simulations.happenings import Happened, in_lines

    folder = RunDirectory.open(run)
    study = load_study(folder.path / "study.toml")
    events = list(folder.events())
    rounds = [event["round"] for event in events if event["event"] == "round"]
    happened = Happened.of(events)
    troubles = [
        e
        for e in events
        if e["event"] in {"refused", "failed", "aborted"} and not happened.explains(e)
    ]
    last = events[-1]["event"] if events else "prepared"
    state = last if last in {"finished", "aborted", "prepared"} else "running or killed"
    value = {
        "run": str(run),
        "study": study.study.name,
        "state": state,
        "round": max(rounds, default=0),
        "rounds": study.study.rounds,
        "happened": in_lines(happened),
        "troubles": troubles,
    }
    if json_output:
        _emit(value)
    else:
        print_status(value)


@app.command()
def tasks(json_output: Json = False) -> None:
    """List the tasks that can be studied."""
    from fedward.console import print_tasks
    from fedward.tasks.registry import descriptions, get_task

    values = [
        {"name": name, "description": line, "models": list(get_task(name).models)}
        for name, line in descriptions().items()
    ]
    if json_output:
        _emit({"tasks": values})
    else:
        print_tasks(values)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(context: typer.Context) -> None:
    """Verify a store's newest release and serve it; also: keys, approve, decline, log."""
    from fedward.serving.__main__ import main as run_adapter

    raise typer.Exit(run_adapter(list(context.args), program="fedward serve"))


@ledger_app.command("show")
def ledger_show(site: SiteFile, json_output: Json = False) -> None:
    """Show what a site's patients have spent, study by study."""
    from fedward.client.books import ledger_summary
    from fedward.console_privacy import print_ledger

    value = ledger_summary(site)
    if json_output:
        _emit(value)
    else:
        print_ledger(value)


@ledger_app.command("verify")
def ledger_verify(
    site: SiteFile,
    json_output: Json = False,
    head: Annotated[
        str | None,
        typer.Option(help="A head seen before, such as a release's: is it still in the ledger?"),
    ] = None,
) -> None:
    """Check a ledger's chain, signatures and epsilon, and that it was not rolled back."""
    from fedward.client.books import verify_ledger

    try:
        value = verify_ledger(site, head=head)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--head") from error
    if json_output:
        _emit(value)
    else:
        seen = "" if head is None else ", the given one is in it"
        if value["against_releases"]:
            seen += f"; so is that of {value['against_releases']} release(s) in the store"
        sys.stdout.write(f"{value['entries']} entries verify; head {value['head']}{seen}\n")


@ledger_app.command("export")
def ledger_export(
    site: SiteFile,
    json_output: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default standard output.")
    ] = None,
) -> None:
    """Write every entry and signature as JSON, for an auditor who has the site's public key."""
    from fedward.client.books import export_ledger
    from fedward.core.files import write_atomic

    value = export_ledger(site)
    if out is None:
        _emit(value)
        return
    write_atomic(out, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    if json_output:
        _emit({"export": str(out), "entries": len(value["entries"]), "head": value["head"]})
    else:
        sys.stdout.write(f"{out}: {len(value['entries'])} entries; head {value['head']}\n")


@app.command()
def audit(
    conformance: Annotated[
        bool, typer.Option("--conformance", help="Does the trainer do what its epsilon assumes?")
    ] = False,
    mode: Annotated[
        str | None, typer.Option(help="Only this way of clipping; by default every one.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Audit the trainer that is installed here, on random records; ends with 1 if it fails."""
    if not conformance:
        raise typer.BadParameter("say what to audit", param_hint="--conformance")
    from fedward.client.conformance import audit_conformance
    from fedward.client.training.plan import MODES
    from fedward.console_privacy import auditing, print_conformance

    chosen = [known for known in (*MODES, "auto") if mode in {None, known}]
    if not chosen:
        raise typer.BadParameter(f"choose auto, {', '.join(MODES)}", param_hint="--mode")
    with auditing(quiet=json_output) as show:
        value = audit_conformance(chosen if mode else MODES, show=show)
    if json_output:
        _emit(value)
    else:
        print_conformance(value)
    if not value["passed"]:
        raise typer.Exit(1)


@site_app.command("check")
def site_check(site: SiteFile, json_output: Json = False) -> None:
    """Read a site's data as training would, and say whether all is well."""
    from fedward.client.books import check_site
    from fedward.console import print_site

    value = check_site(site)
    if json_output:
        _emit(value)
    else:
        print_site(value)


if __name__ == "__main__":
    command()
