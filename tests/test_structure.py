"""The code base is within its limits, and they are measured correctly. `pytest -s` prints the table."""

import ast
from pathlib import Path

import pytest
from structure import LIMITS, House, circles, passing_lines, recurring_lines, signature_lines, table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house() -> House:
    found = House.at(ROOT)
    print(f"\n{table(found)}")
    return found


@pytest.mark.parametrize("rule", sorted(LIMITS))
def test_the_code_base_is_within_its_limits(house, rule):
    allowed, offenders = LIMITS[rule]
    found = offenders(house)
    assert not found, f"{allowed}, but {'; '.join(found)}"


def test_there_is_something_to_measure(house):
    assert len(house.outside) > 100
    assert {"registry", "ops", "mixers", "models"} <= house.rooms.keys()
    assert len(house.ops) > 10
    assert {"retention", "gla", "delta_net"} <= set(house.families) < house.mixers.keys()
    assert house.mixers.keys() - house.families >= {"attention", "hyena"}
    assert house.example > 20


def built(root: Path, **texts: str) -> House:
    """A checkout of files, `a__b` for a/b.py, each folder with an `__init__.py`."""
    for name, text in texts.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return House.at(root)


def test_lines_are_counted_by_folder_without_hidden_and_installed_ones(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    texts = {"cli": "1\n" * 5, "ops__decay__api": "1\n\n" * 10}
    house = built(tmp_path, **texts, **dict.fromkeys(("tests__x", "build__x", "env__x", ".hidden__x"), "1\n" * 9))
    assert house.length == 25
    assert house.rooms == {"ops": 20, ".": 5}
    assert house.biggest_room == ("ops", 0.8)


def test_a_cycle_through_a_package_is_found(tmp_path):
    others = {"ops__c": "from .a import f", "ops__d": "from .c import h"}
    house = built(tmp_path, ops__a="from ..models import f", models__b="from ..ops.a import g", **others)
    assert house.circles == []
    (tmp_path / "models" / "__init__.py").write_text("from .b import f")
    assert House.at(tmp_path).circles == [["seqmix.models", "seqmix.models.b", "seqmix.ops.a"]]


def test_cycles_are_separate_components():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "g"}, "g": set()}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def numbered(text: str, mark: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), 1) if mark in line}


def test_lines_of_signatures_and_of_passed_arguments_are_counted():
    text = """
@decorated(
    by=1,
)
def short(q, k): return q  # signature

class Layer(
    Base,
):
    async def step(  # signature
        self,  # signature
        q: Float[Tensor, "B T H K"],  # signature
        by=lambda x: x[1:],  # signature
    ) -> tuple[Tensor, Tensor]:  # signature
        return [lambda x: x, {1: 2}]

one = f(q, k, v)
y = f(
    q,  # passed
    k, -scale, *rest,  # passed
    w, w + 1,
    initial_state=state.memory,  # passed
    log_decay=g.float(),
    beta=beta if beta is None else 1,
    v=h(
        v,  # passed
    ),
    **options,  # passed
)
found = [
    q,
]
"""
    assert signature_lines(text) == numbered(text, "# signature")
    assert passing_lines(ast.parse(text)) == numbered(text, "# passed") | {3}


def test_a_line_in_three_other_files_recurs():
    texts = {name: f"import torch\n\n  own = {name}\n" for name in "abcd"}
    assert recurring_lines(texts) == {name: ["import torch"] for name in "abcd"}
    del texts["d"]
    assert recurring_lines(texts) == {name: [] for name in "abc"}


def test_mixers_are_known_by_their_kind_and_family(tmp_path):
    def kind(name: str, op: str) -> str:
        return f'from ..ops.{op}.api import f\nfrom .gates import g\nkind: Literal["{name}"]\n'

    house = built(
        tmp_path,
        ops__decay__api="",
        ops__softmax__api="",
        mixers__gates="from ..ops.softmax.api import f\n",
        mixers__retention=kind("retention", "decay"),
        mixers__attention=kind("attention", "softmax"),
        mixers__copied=kind("retention", "decay"),
    )
    assert set(house.mixers) == {"retention", "attention"}
    assert house.families == ["retention"]


def test_every_limit_finds_its_offenders(tmp_path):
    wide = "def f(\n" + "    q,\n" * 50 + "):\n    pass\n"
    mixer = 'kind: Literal["{0}"]\n' + "x = 1\ny = 2\nz = 3\n" * 40
    house = built(
        tmp_path,
        ops__a=f"from . import b\n{wide}",
        ops__b="from . import a\n" + "x = 1\n" * 450,
        **{f"mixers__{name}": mixer.format(name) for name in ("one", "two", "three", "four")},
        training__run="x = 1\n" * 47_901,
    )
    found = {rule: offenders(house) for rule, (_, offenders) in LIMITS.items()}
    assert found["length"] == [f"{house.length:,}"]
    assert [line.partition(":")[0] for line in found["room"]] == ["training"]
    assert found["files"] == ["ops/b.py: 451", "training/run.py: 47901"]
    assert found["circles"] == ["seqmix.ops.a - seqmix.ops.b"]
    assert found["plumbing"] == []  # 52 of 505 lines are not 12 %
    assert found["mixers"] == [f"{kind}: 121" for kind in ("four", "one", "three", "two")]
    assert len(found["recurring"]) == 4
    assert found["example"] == ["0"]
    (tmp_path / "ops" / "c.py").write_text(wide)
    worst = LIMITS["plumbing"][1](House.at(tmp_path))
    assert [line.partition(":")[0] for line in worst] == ["18.6% of the ops", "ops/a.py", "ops/c.py"]
