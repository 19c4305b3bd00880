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
    config = make_config(method)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(path) == config
    assert load_config(path).run_id == config.run_id


def test_where_a_run_happens_does_not_change_its_name():
    base = make_config("ce").run_id
    for field, value in dict(out_dir="x", cache_dir="y", device="cpu", precision="fp32", workers=3, checkpoint_every=7, tensorboard=True).items():
        assert field in PLACE and make_config("ce", **{field: value}).run_id == base


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
                       st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.floats(-2, 2), st.text(max_size=8), st.lists(st.floats(-1, 2), max_size=4)), max_size=4))
def test_any_values_give_a_config_or_a_sentence(fields):
    try: config = make_config(**fields)
    except ConfigError as e: assert str(e) and "\n" not in str(e)
    else: assert make_config(**json.loads(config.model_dump_json())).run_id == config.run_id
