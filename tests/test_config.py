"Config: what the notebook's parameters are, and what a wrong one gets."
import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmrs_nb.config import METHODS, PLACE, ConfigError, RunConfig, load_config, make_config

BUDGET = dict(steps=10, batch_size=4)   # without it the data has to choose, and there is no name yet
RUN_NOTEBOOK = Path(__file__).parents[1] / "nbs" / "benchmarks" / "01_run.ipynb"


def test_run_notebook_parameters_are_the_fields_of_run_config():
    parameters = papermill.inspect_notebook(str(RUN_NOTEBOOK))
    assert set(parameters) == set(RunConfig.model_fields)
    assert {n for n, p in parameters.items() if p["default"] != "None"} == {"method"}
    for name, p in parameters.items():
        description = RunConfig.model_fields[name].description
        assert name == "method" or p["help"].strip() == description, f"{name}: the notebook says {p['help']!r}, RunConfig says {description!r}"


def test_papermill_with_an_unknown_parameter_fails_and_names_the_nearest(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", str(RUN_NOTEBOOK), str(tmp_path / "out.ipynb"), "--no-progress-bar",
                           "-p", "mehtod", "ce", "-p", "out_dir", str(tmp_path / "runs")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "mehtod: unknown parameter; did you mean 'method'?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_is_valid_and_survives_its_own_json(method, tmp_path):
    config = make_config(method, **BUDGET | (dict(steps=0) if METHODS[method]["fields"].get("steps") == 0 else {}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(path) == config
    assert load_config(path).run_id == config.run_id


def test_where_a_run_happens_does_not_change_its_name():
    base = make_config("ce", **BUDGET).run_id
    for field, value in dict(out_dir="x", cache_dir="y", device="cpu", precision="fp32", workers=3, checkpoint_every=7, tensorboard=True).items():
        assert field in PLACE and make_config("ce", **BUDGET, **{field: value}).run_id == base


@pytest.mark.parametrize("text, says", [("{", "expected JSON"), ("[1]", "expected a JSON object"), ('{"lr": -1}', "lr: found -1"),
                                        ('{"methd": "ce"}', "did you mean 'method'"), ('{"method": "crt9"}', "method: found 'crt9'"),
                                        ('{"lambdas": [1]}', "give one for each expert")])
def test_a_bad_config_file_gets_a_sentence_that_names_it(tmp_path, text, says):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error: load_config(path)
    assert str(path) in str(error.value) and says in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*RunConfig.model_fields, "nonsense"]),
                       st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.floats(-2, 2), st.text(max_size=8), st.sampled_from(["~nobody/x", "a\0b", "x" * 300, "0.1,0.2,0.3"]), st.lists(st.floats(-1, 2), max_size=4)), max_size=4))
def test_any_values_give_a_config_or_a_sentence(fields):
    try: config = make_config(**fields)
    except ConfigError as e: assert str(e) and "\n" not in str(e)
    else: assert make_config(**json.loads(config.model_dump_json())) == config


def test_stored_runs_keep_their_names_and_their_content():
    stored = list((RUN_NOTEBOOK.parent / "results").glob("*/*/config.json"))
    assert len(stored) >= 30
    for path in stored:
        fields = json.loads(path.read_text())
        config = make_config(**fields)
        assert config.run_id == path.parent.name
        assert config.content() == json.loads(json.dumps(fields)), "a run that was begun by an earlier version is gone on with"


def test_a_new_field_counts_when_it_is_given():
    base = make_config("ce", **BUDGET).run_id
    given = [make_config("ce", **BUDGET, **{f: v}).run_id for f, v in dict(quick_gelu=True, mean="0.5,0.5,0.5", std=[.2, .2, .2], interpolation="bilinear", train_fraction=.5).items()]
    assert len({base, *given}) == 6
    assert make_config("ce", mean="0.5, 0.4, 0.3").mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize("fields, says", [(dict(mean="0.5,0.5"), "expected three numbers"), (dict(mean="120,115,100"), "divided by 255"), (dict(std=[0, 1, 1]), "above 0"),
                                          (dict(interpolation="bicubi"), "did you mean 'bicubic'"), (dict(train_fraction=0), "train_fraction: found 0")])
def test_preprocessing_that_cannot_be_meant_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says): make_config("ce", **fields)


def test_one_rule_for_paths_in_python_in_the_command_and_in_the_notebook(tmp_path, monkeypatch):
    from dmrs_nb.config import config_from_notebook
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir(); (tmp_path / "w.safetensors").touch(); (tmp_path / "c.json").write_text(json.dumps(dict(data_root="mine/", **BUDGET)))
    meant = make_config(data_root=str(tmp_path / "mine"), **BUDGET)
    for config in (make_config(data_root=Path("mine"), **BUDGET), load_config("c.json"), config_from_notebook({"data_root": "./mine", **BUDGET})[0]):
        assert config == meant and config.run_id == meant.run_id
    assert meant.out_dir == str(tmp_path / "runs")
    assert [make_config(pretrained=p).pretrained for p in ("openai", "w.safetensors")] == ["openai", str(tmp_path / "w.safetensors")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_config(data_root="~/mine").data_root == meant.data_root


@pytest.mark.parametrize("field", ["data_root", "train_list", "out_dir", "cache_dir", "class_words", "pretrained"])
@pytest.mark.parametrize("path, says", [("", "empty path"), ("~no-such-user/x", "no user '~no-such-user'"), ("a\0b", "NUL"), ("x" * 300, "a file name has 255"), ("a\ud800", "no file name can")])
def test_a_path_that_cannot_be_one_is_a_sentence(field, path, says):
    with pytest.raises(ConfigError) as error: make_config(**{field: path})
    assert str(error.value).startswith(f"{field}: found") and says in str(error.value)


@pytest.mark.parametrize("method, fields, says", [
    ("ce", dict(classifier="cosine", adapter="linear"), "needs adapter=lora, dense or adaptformer"), ("lift", dict(classifier="text"), "needs classifier=cosine or linear"),
    ("sade", dict(num_experts=2), "made for num_experts=3"), ("ce", dict(combine="product"), "joins experts"), ("crt", dict(classifier="text"), "needs classifier=linear"),
    ("dmrs", dict(stage2="posthoc-la"), "works on one expert"), ("clip-lora", dict(stage2="posthoc-la"), "does not go with text_lora"), ("coop", dict(logit_scale=30), "logit_scale belongs to"),
    ("linear-probe", dict(tte=True), "tte needs"), ("ce", dict(thresholds="20,100"), "larger number first"), ("ce", dict(thresholds="many"), "two whole numbers"),
    ("tip-adapter", dict(steps=5), "has nothing to train"), ("ce", dict(train_list="a.txt"), "go together"), ("ce", dict(train_list="a.txt", test_list="b.txt"), "needs data_root"),
    ("ce", dict(mixing="mixup", mix_prob=0.5), "mixing=cmo"), ("coop", dict(num_experts=2), "needs adapter=lora or dense")])
def test_fields_that_do_not_go_together_get_a_sentence(method, fields, says):
    with pytest.raises(ConfigError, match=says): make_config(method, **fields)


def test_raw_words_are_no_file_and_official_is_all_switches():
    from dmrs_nb.config import OFFICIAL
    official = make_config("dmrs-official")
    assert official.class_words == "raw"
    for fields in OFFICIAL.values():
        assert all(getattr(official, k) == v for k, v in fields.items())
        assert make_config("dmrs", **BUDGET, **fields).run_id != make_config("dmrs", **BUDGET).run_id


def test_a_config_that_the_data_has_to_finish_has_no_name():
    assert make_config("ce").open == ["batch_size", "steps"] and make_config("zero-shot").open == []
    with pytest.raises(ConfigError, match="batch_size will be chosen"): make_config("ce", epochs=2).run_id
