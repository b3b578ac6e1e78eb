"""What the command line says before it does anything: help, versions, usage errors; without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fresh_process import FreshProcess
from typer.testing import CliRunner

from diffusers_bitsfusion.cli import app
from diffusers_bitsfusion.cli.train_arguments import parse_args

REPOSITORY = Path(__file__).resolve().parents[2]
CLI = REPOSITORY / "diffusers_bitsfusion" / "cli"
COMMANDS = (
    "quantize", "inspect", "draw", "compare", "evaluate", "vote", "analyze", "allocate", "export", "app", "train",
)  # fmt: skip
# Runs the console script's entry point, then tells which of the heavy packages it imported.
LAUNCH = """
import sys
from bitsfusion_launcher import main
try:
    main()
finally:
    heavy = {"torch", "diffusers", "transformers", "peft", "numpy", "huggingface_hub", "diffusers_bitsfusion"}
    print("imported:", *sorted(heavy & sys.modules.keys()))
"""


def launch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `bitsfusion` in a fresh process, in a folder that is not the repository."""
    command = [sys.executable, "-c", LAUNCH, *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], prog_name="bitsfusion")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("--version",), ("quantize", "--help"), ("train", "--help"), ("train", "--typo", "1")],
)
def test_help_and_typos_import_nothing_heavy(arguments, tmp_path):
    assert launch(*arguments, folder=tmp_path).stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("arguments", [("quantze",), ("quantize", "--tpyo"), ("train", "--tpyo", "1"), ("quantize",)])
def test_a_typo_is_named_in_few_lines(arguments, tmp_path):
    result = launch(*arguments, folder=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) <= 6, result.stderr


def test_the_launched_command_line_runs_commands(tmp_path, packed_folders):
    result = launch("inspect", str(packed_folders["keep"]), folder=tmp_path)
    assert result.returncode == 0 and "whole pipeline" in result.stdout, result.stderr
    missing = FreshProcess(["-c", LAUNCH, "inspect", "no/such"]).result()
    assert missing.returncode == 1 and "There is no folder no/such" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_files_of_the_command_line_import_the_package_by_its_full_name():
    """The launcher loads them without the package around them."""
    for file in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{file.name} imports relatively beyond cli"


def test_versions():
    result = CliRunner().invoke(app, ["--version"])
    assert re.fullmatch(r"diffusers_bitsfusion \S+ \(diffusers \S+, torch \S+, Python \S+\)\n", result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_texts_are_whole(command):
    text = " ".join(help_of(command).split())
    assert "[]" not in text and "needs ." not in text and "[default: ]" not in text
    for extra in re.findall(r"needs ?(\S*)", text):
        assert extra, text


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "train"])
def test_every_option_with_a_value_names_its_default_or_is_required(command):
    group = typer.main.get_command(app)
    options = [param for param in group.commands[command].params if param.param_type_name == "option"]
    context = group.make_context("bitsfusion", [command])
    assert len(options) > 4
    for option in options:
        _, text = option.get_help_record(context)
        is_switch = option.is_flag or option.name == "json_file"
        assert is_switch or "efault: " in text or "[required]" in text, f"{option.opts}: {text}"
        assert option.help and option.help.endswith("."), option.opts


def test_every_argument_of_training_has_a_help_text_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"], "train", "")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("--learning_rate LEARNING_RATE Peak of the schedule. [default: 1e-05]", "[default: 20000]"):
        assert default in text
    assert "{1,2,both} The stages to run. [default: both]" in text


def test_completion_can_be_shown(tmp_path):
    assert "--show-completion" in CliRunner().invoke(app, ["--help"]).output
