"""Policies and admission rules that a user brings: of a file and of a package, and what they do wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from routing import random_trace

from gpu_cache import rule_check, template_admission, template_policy, template_prefetch
from gpu_cache.admission import ADMISSIONS
from gpu_cache.errors import CacheError
from gpu_cache.policies import POLICIES, known_policy, make_policy, names_of_policies, policy_class
from gpu_cache.policy_check import RULES, check_policy
from gpu_cache.prefetch import LEARNT, known_prefetch
from gpu_cache.simulator import Setting, replay
from gpu_cache.source import source_digest
from gpu_cache.sweep import sweep
from gpu_cache.trace import calls

TRACE = calls(random_trace(11, steps=60, layers=4, experts=8, top_k=2, tokens=2))
TEMPLATE = str(Path(template_policy.__file__))
BEGIN = "from gpu_cache.policies.base import Policy\nclass P(Policy):\n"
CHOOSES = ("ways = range(index * self.nways, (index + 1) * self.nways)",)
GIVES = "return next((slot for slot in ways if slot not in blocked), None)"
HOOKS = {
    "__init__": "geometry, seed",
    "on_lookup": "layer, experts, scores, slots",
    "on_fill": "slot, key",
    "replace": "index, key, blocked",
    "on_call": "keys",
    "wants": "index, key",
    "follow": "layer, experts",
}


def method(name: str, *lines: str) -> str:
    return f"    def {name}(self, {HOOKS[name]}):\n" + "".join(f"        {line}\n" for line in lines)


GOOD = method("replace", *CHOOSES, GIVES)
RULE = "from gpu_cache.admission import Admission\nclass R(Admission):\n"
AHEAD = "from gpu_cache.prefetch import Prefetch\nclass A(Prefetch):\n"


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", [*POLICIES, TEMPLATE])
def test_policies_of_the_project_and_the_template_keep_the_rules(name: str) -> None:
    assert check_policy(policy_class(name)) == list(RULES if name not in ("random", "LeCaR") else RULES[:-1])


RULES_THAT_STAND = [*ADMISSIONS, *LEARNT, template_admission.__file__, f"{template_prefetch.__file__}:MyRule:3"]


@pytest.mark.parametrize("name", RULES_THAT_STAND)
def test_rules_of_the_project_and_the_templates_keep_the_rules(name: str) -> None:
    kind = rule_check.class_of(name)
    assert rule_check.check(kind) == list(
        rule_check.ADMISSION_RULES if issubclass(kind, rule_check.Admission) else rule_check.PREFETCH_RULES
    )


def test_what_there_is_by_name_and_what_is_not() -> None:
    found = rule_check.described()
    assert list(found) == ["policies", "admission rules", "prefetches"]
    assert list(found["policies"]) == list(names_of_policies()) and "none" not in found["prefetches"]
    with pytest.raises(CacheError, match="'nothing' is no policy, no admission rule and no prefetch: use one of 2Q"):
        rule_check.class_of("nothing")


UPSIDE_DOWN = "ways = ways if self.seen {} else reversed(ways)"
WRONG = [
    ("import nothing_at_all\n", 1, "ModuleNotFoundError"),
    ("x = 1\nx = = 2\n", 2, "SyntaxError"),
    ("def f():\n    raise SystemExit(3)\n\n\nf()\n", 2, "SystemExit: 3"),
    ("class P:\n    pass\n", 1, "P is not a Policy"),
    (BEGIN + "    pass\n", 2, "no replace"),
    (BEGIN + "    def __init__(self, geometry):\n        pass\n" + GOOD, 2, "from a geometry and a seed"),
    (BEGIN + method("__init__", "pass") + GOOD, 2, "calls super().__init__"),
    (BEGIN + method("replace", "return index * self.nways"), 3, "the blocked slot"),
    (BEGIN + method("replace", "return -1"), 3, "the foreign slot -1"),
    (BEGIN + method("replace", "return True"), 3, "a slot is an int"),
    (BEGIN + method("replace", "return None"), 3, "evicted nothing"),
    (BEGIN + GOOD + method("on_fill", "{}[slot]"), 7, "on_fill of P failed: KeyError"),
    (BEGIN + GOOD + "    def on_lookup(self, layer):\n        pass\n", 2, "TypeError"),
    (BEGIN + GOOD + method("on_lookup", "experts.sort()"), 6, "changed what it was given"),
    (BEGIN + method("replace", "blocked.add(-5)", *CHOOSES, GIVES), 3, "changed the blocked slots"),
    (
        "import random\n" + BEGIN + method("replace", *CHOOSES, "ways = random.sample(ways, self.nways)", GIVES),
        4,
        "the second time",
    ),
    (
        BEGIN
        + "    seen = None\n"
        + method("on_lookup", "self.seen = slots")
        + method("replace", *CHOOSES, UPSIDE_DOWN.format(""), GIVES),
        6,
        "changed later",
    ),
    (
        BEGIN
        + "    seen = 0\n"
        + method("on_lookup", "self.seen += sum(experts)")
        + method("replace", *CHOOSES, UPSIDE_DOWN.format("% 2"), GIVES),
        6,
        "other indexes",
    ),
]


WRONG_RULES = [
    (RULE + "    pass\n", 2, "R has no wants"),
    (
        RULE + "    def __init__(self, geometry):\n        pass\n" + method("wants", "return True"),
        2,
        "geometry and costs",
    ),
    (RULE + method("wants", "return None"), 3, "wants returned None; it is True or False"),
    (RULE + method("wants", "return index / 0"), 4, "wants of R failed: ZeroDivisionError"),
    (
        RULE + method("on_call", "keys.pop()") + method("wants", "return True"),
        3,
        "on_call of R changed what it was given",
    ),
    (
        RULE + "    kept = []\n" + method("on_call", "self.kept = keys") + method("wants", "return key in self.kept"),
        6,
        "keep",
    ),
    (
        "import random\n" + RULE + method("wants", "return random.random() < 0.5"),
        4,
        "the second time (4 x 4); the same",
    ),
    (AHEAD + "    pass\n", 2, "A has no choose and no follow"),
    (
        AHEAD + "    def ahead(self, layer):\n        return 0\n" + method("follow", "return []"),
        3,
        "an ahead of its own",
    ),
    (
        AHEAD + method("__init__", "pass").replace("seed", "depth") + method("follow", "return []"),
        2,
        "super().__init__",
    ),
    (AHEAD + method("follow", "return 1"), 3, "follow returned 1; it is a list of the numbers of experts"),
    (AHEAD + method("follow", "return [0.5]"), 3, "follow returned [0.5]; it is a list of the numbers"),
    (AHEAD + method("follow", "return [0, 12]"), 3, "a layer has experts 0 to 11, not 12"),
    (AHEAD + method("follow", "return [-1]"), 3, "a layer has experts 0 to 11, not -1"),
    (AHEAD + method("follow", "return {}[layer]"), 4, "follow of A failed: KeyError"),
    (AHEAD + method("follow", "experts.sort(key=lambda e: -e)", "return []"), 3, "changed what it was given"),
    (
        AHEAD + "    kept = []\n" + method("follow", "k, self.kept = self.kept, experts", "return k"),
        4,
        "copy what you keep",
    ),
    (
        "import random\n" + AHEAD + method("follow", "return [random.randrange(9)]"),
        4,
        "the second time (4 x 4, depth 1)",
    ),
    ("class R:\n    pass\n", 1, "R is not a Policy of gpu_cache.policies.base or an Admission of gpu_cache.admission"),
]


@pytest.mark.parametrize(("text", "line", "rule"), WRONG_RULES, ids=[rule for _, _, rule in WRONG_RULES])
def test_what_a_rule_does_wrong_is_said_in_one_line(tmp_path, text: str, line: int, rule: str) -> None:
    name = written(tmp_path, text)
    with pytest.raises(CacheError) as raised:
        rule_check.check(rule_check.class_of(f"{name}:{'A' if text.count('A(') else 'R'}"))
    assert f"{name} line {line}: " in str(raised.value) and rule in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "line", "rule"), WRONG, ids=[rule for _, _, rule in WRONG])
def test_what_is_wrong_is_said_in_one_line(tmp_path, text: str, line: int, rule: str) -> None:
    name = written(tmp_path, text)
    with pytest.raises(CacheError) as raised:
        check_policy(policy_class(f"{name}:P"))
    assert f"{name} line {line}: " in str(raised.value) and rule in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "mine.py", "is no file"),
        (BEGIN + GOOD, "mine.py:Q", "has no class Q that is a Policy of gpu_cache.policies.base; it has P"),
        ("x = 1\n", "mine.py", "it has none"),
        (BEGIN + GOOD + BEGIN.replace("P(", "Q(") + GOOD, "mine.py", "it has P, Q: name one"),
        ("x = '\0'\n", "mine.py", "must import by itself"),
        (BEGIN + GOOD + "#" * (1 << 20), "mine.py", "is larger than"),
    ],
)
def test_a_file_without_the_policy_is_refused(tmp_path, text: str | None, name: str, message: str) -> None:
    if text is not None:
        written(tmp_path, text)
    with pytest.raises(CacheError, match="mine.py") as raised:
        make_policy(str(tmp_path / name), Setting(4, 4).geometry(TRACE))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_replay_ends_where_a_policy_breaks_a_rule(tmp_path) -> None:
    name = written(tmp_path, BEGIN + method("replace", "return 0"))
    for delay in (0, 2):
        with pytest.raises(CacheError, match=r"line 3: replace returned the (foreign|blocked) slot 0"):
            replay(TRACE, Setting(4, 4, name, delay=delay))


def test_a_file_is_replayed_beside_the_others_and_is_one_of_them_if_it_is_a_copy(tmp_path) -> None:
    source = Path(__file__).parents[2] / "gpu_cache" / "policies" / "lfu.py"
    name = written(tmp_path, source.read_text(), "copy.py")
    mine, ours = sweep(TRACE, [Setting(3, 4, f"{name}:Lfu"), Setting(3, 4, "LFU")], workers=2)
    assert mine["policy"] == f"{name}:Lfu"
    assert {**mine, "policy": ""} == {**ours, "policy": ""}


def test_a_changed_file_is_another_policy(tmp_path) -> None:
    name = written(tmp_path, BEGIN + GOOD)
    first, digest = policy_class(name), source_digest(name)
    assert policy_class(name) is first
    written(tmp_path, BEGIN + GOOD.replace("None)", "None) "))
    assert policy_class(name) is not first and source_digest(name) != digest


def test_packages_offer_policies_and_rules_by_entry_points(tmp_path, monkeypatch) -> None:
    offered = BEGIN + GOOD + RULE + method("wants", "return False") + AHEAD + method("follow", "return experts")
    written(tmp_path, offered, "offered.py")
    about = tmp_path / "offered-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: offered\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[hybrid.policies]\nmine = offered:P\ngone = offered:Q\n[hybrid.admissions]\nnever = offered:R\n"
        "[hybrid.prefetches]\nSame = offered:A\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names_of_policies() == (*POLICIES, "gone", "mine")
    assert known_policy("MINE") == "mine"
    result = replay(TRACE, Setting(4, 4, "mine"))
    assert result.hits.sum() > 0
    assert replay(TRACE, Setting(4, 4, "mine", "never")).fills.sum() == 0
    assert known_prefetch("same:02") == "Same:2" and "Same" not in rule_check.described()["policies"]
    assert rule_check.described()["prefetches"]["Same"] == " (of an installed package)"
    assert "cannot be imported" in rule_check.described()["policies"]["gone"]
    assert replay(TRACE, Setting(4, 4, "mine", "never", prefetch="same")).prefetched > 0
    with pytest.raises(CacheError, match="'gone' .offered:Q. cannot be imported: AttributeError"):
        make_policy("gone", Setting(4, 4).geometry(TRACE))


def test_an_admission_rule_of_a_file(tmp_path) -> None:
    even = written(tmp_path, RULE + method("wants", "return key % 2 == 0"), "even.py")
    result = replay(TRACE, Setting(4, 4, admission=even))
    assert 0 < result.fills.sum() < replay(TRACE, Setting(4, 4)).fills.sum()
    late = replay(TRACE, Setting(4, 4, admission=f"{even}:R", delay=1))
    assert np.array_equal(late.calls, result.calls)
    with pytest.raises(CacheError, match="bad.py line 4: wants of R failed: ZeroDivisionError"):
        replay(TRACE, Setting(4, 4, admission=written(tmp_path, RULE + method("wants", "return 1 / 0"), "bad.py")))
    with pytest.raises(CacheError, match="use one of always, second-touch, break-even, or FILE.py:CLASS"):
        replay(TRACE, Setting(4, 4, admission="sometimes"))


def test_a_prefetch_of_a_file(tmp_path) -> None:
    """It copies what the template does, however far ahead, and a change of the file is another result."""
    name = written(tmp_path, Path(template_prefetch.__file__).read_text(), "ahead.py")
    results = {rule: replay(TRACE, Setting(4, 4, prefetch=rule)) for rule in (name, f"{name}:1", f"{name}:MyRule:3")}
    near, same, far = results.values()
    assert near.used > 0 and np.array_equal(near.found, same.found) and not np.array_equal(near.found, far.found)
    settings = [Setting(4, 4, prefetch=rule) for rule in results]
    assert [row["prefetched"] for row in sweep(TRACE, settings)] == [r.prefetched for r in results.values()]
    digest = source_digest("LRU", prefetch=f"{name}:2")
    assert digest != source_digest("LRU")
    written(tmp_path, Path(name).read_text() + "\n", "ahead.py")
    assert digest != source_digest("LRU", prefetch=f"{name}:2")
    bad = written(tmp_path, AHEAD + method("follow", "return [8]"), "bad.py")
    with pytest.raises(CacheError, match="bad.py line 3: follow returned .8.; a layer has experts 0 to 7, not 8"):
        replay(TRACE, Setting(4, 4, prefetch=bad))
    for wrong, text in (
        (f"{name}:0", "1 to 64 lookups"),
        (f"{name}:Other", "has no class Other that is a Prefetch of gpu_cache.prefetch; it has MyRule"),
        (str(tmp_path / "gone.py"), "is no file"),
        ("perhaps", "use one of none, frequency, transition, next-gate, perfect, or FILE.py:CLASS"),
    ):
        with pytest.raises(CacheError, match=text):
            Setting(4, 4, prefetch=wrong).check(TRACE)
    with pytest.raises(CacheError, match="line 2: A has no choose and no follow"):  # before anything is replayed
        Setting(4, 4, prefetch=written(tmp_path, AHEAD + "    pass\n", "none.py")).check(TRACE)
