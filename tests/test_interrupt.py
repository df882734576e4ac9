"""`writesae.interrupt`: the first signal is noted, the second acts; handlers come back; what `writesae` says then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from writesae import cli
from writesae.interrupt import SIGNALS, finishing, held, script


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted_and_the_second_acts(number, capsys):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt), finishing("shard") as stop:
        assert not stop
        stop.check()
        os.kill(os.getpid(), number)
        assert stop
        assert capsys.readouterr().err.strip() == "stopping after this shard; once more to stop at once"
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one did nothing")
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_stop_that_was_asked_for_is_an_interrupt():
    with finishing("shard") as stop:
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.check()


def test_nothing_changes_where_nothing_is_kept_or_no_signal_arrives():
    before = signal.getsignal(signal.SIGINT)
    with finishing("shard", kept=False):
        assert signal.getsignal(signal.SIGINT) is before
    found = []

    def elsewhere():
        with finishing("shard") as stop:
            found.append((bool(stop), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_child_is_held_from_what_its_parent_gets():
    code = "import os, signal; [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM)]; print('lives')"
    with held():
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0] == "lives\n" and child.returncode == 0
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_interrupted_script_ends_as_the_commands_do(capsys):
    def main():
        with finishing("step") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.check()

    with pytest.raises(SystemExit) as end:
        script(main)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    script(lambda: None)


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize("how", ["raises", "returns"])
def test_a_command_says_how_to_go_on(name, how, monkeypatch, capsys):
    def run(args):
        if how == "raises":
            raise KeyboardInterrupt
        return 130

    command = cli.COMMANDS[name]
    monkeypatch.setattr(sys.modules[command.module] if command.module in sys.modules else _loaded(name), "run", run)
    assert cli.main(command.example.replace("'", "").split()[1:]) == 130
    err = capsys.readouterr().err
    assert err == f"writesae {name}: interrupted" + (f": {command.interrupted}\n" if command.interrupted else "\n")
    assert ("--out" in command.example or name in ("bench", "merge", "push", "export")) == bool(command.interrupted)


def _loaded(name: str):
    cli.parser(name)
    return sys.modules[cli.COMMANDS[name].module]
