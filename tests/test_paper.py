"""The paper's studies: their command, what they write, how they are resumed and refused."""

import json

import pytest

from writesae.cli import main
from writesae.paper import Claim, Findings, Study, studies
from writesae.paper.study import save


def test_a_study_writes_its_statistics_table_and_pictures_and_goes_on_with_the_same(tmp_path, capsys):
    command = ["paper", "partition", "--quick", "--set", "passages=4", "--out", str(tmp_path)]
    assert main(command) == 0
    first = json.loads((tmp_path / "partition/summary.json").read_text())
    rows = (tmp_path / "partition/features.csv").read_text().splitlines()
    assert (
        rows[0] == "layer,head,feature,firings,median,shuffled" and len(rows) - 1 == first["statistics"]["all"]["alive"]
    )
    assert (tmp_path / "partition/plots/partition.svg").exists()
    assert {answer["claim"] for answer in first["answers"]} == {claim["key"] for claim in first["claims"]}
    assert main(command) == 0
    again = json.loads((tmp_path / "partition/summary.json").read_text())
    assert again["statistics"] == first["statistics"] and again["settings"]["passages"] == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "name: expected some of partition"),
        ([], "got neither"),
        (["partition", "--all"], "got both"),
        (["partition", "--set", "passages=many"], "set: partition.passages: expected a value like"),
        (["partition", "--set", "wrong=1"], "set: expected one of partition."),
        (["partition", "--train", "stdlib:none", "--validation", "stdlib:none"], "expected"),
    ],
)
def test_bad_words_are_refused_by_name(words, message, tmp_path, capsys):
    assert main(["paper", *words, "--quick", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_every_study_answers_each_claim_once_and_has_a_quick_value_of_every_settings_kind(tmp_path):
    keys = [claim.key for study in studies().values() for claim in study.claims]
    assert len(keys) == len(set(keys))
    for study in studies().values():
        for setting in study.settings.values():
            assert type(setting.full) is type(setting.quick)
    study = Study("x", "X", "", (Claim("x.one", "One.", "1"),), {}, lambda lab: Findings({}))
    with pytest.raises(ValueError, match="answers: expected one for each of x.one, got none"):
        save(study, Findings({}), tmp_path / "x", {})
