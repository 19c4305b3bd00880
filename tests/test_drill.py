"The mutation drill cannot rot: every line that it breaks is still there, and its stored result is that of these mutations, with none survived."
import importlib.util
import json
from datetime import datetime
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("mutation_drill", HERE / "mutation_drill.py")
DRILL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(DRILL)


@pytest.mark.parametrize("mutation", DRILL.MUTATIONS, ids=lambda m: m.name)
def test_the_line_to_break_is_there_once_and_its_tests_too(mutation):
    found = DRILL.places(mutation)
    assert found == 1, f"{mutation.module}.py holds the text {found} times; change mutation_drill.py with the code, and run it with --store"
    file, _, test = mutation.tests.partition("::")
    assert mutation.new != mutation.old and f"def {test.partition('[')[0]}" in (HERE / file).read_text(encoding="utf-8")
    whole = DRILL.source(DRILL.ROOT, mutation.module).read_text(encoding="utf-8")
    compile(whole.replace(mutation.old, mutation.new), mutation.module, "exec")   # broken, not garbled


def test_the_stored_result_is_of_these_mutations_and_none_survived():
    stored = json.loads(DRILL.RESULT.read_text(encoding="utf-8"))
    kept = {m["name"]: m for m in stored["mutations"]}
    assert kept.keys() == {m.name for m in DRILL.MUTATIONS} and len(kept) == len(DRILL.MUTATIONS) == len(stored["mutations"]) >= 16
    for m in DRILL.MUTATIONS:
        assert (kept[m.name]["module"], kept[m.name]["tests"]) == (m.module, m.tests)
        assert kept[m.name]["killed_by"].startswith(m.tests if "::" in m.tests else f"{m.tests}::test_"), m.name
    assert datetime.fromisoformat(stored["date"]) and len(stored["commit"]) >= 40 and stored["packages"]["torch"]
