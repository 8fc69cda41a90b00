from data.records import Record
from eval import arms
from eval.arms import Plan, Task
from eval.protocols import load

SIZE = (64, 64)


def test_captions_are_spread_over_the_records_or_repeated():
    records = [Record(str(k), f"file:/{k}", (f"p{k}",), 10, 10, "") for k in range(10)]
    few = arms.of_captions(records, images=4, buckets=[SIZE], seed=7)
    assert [task.prompt for task in few] == ["p0", "p2", "p5", "p7"]
    assert [task.seed for task in few] == [7, 8, 9, 10]
    many = arms.of_captions(records, images=25, buckets=[SIZE], seed=7)
    assert [task.prompt for task in many] == [f"p{k % 10}" for k in range(25)]


def test_a_protocol_asks_for_each_prompt_as_often_with_other_seeds():
    protocol = load("living", subject="zwx dog", noun="dog")
    tasks = arms.of_protocol(protocol, per_prompt=4, size=SIZE, seed=100)
    assert len(tasks) == 100 and len({task.seed for task in tasks}) == 100
    assert [tasks[k].prompt for k in range(4)] == [tasks[0].prompt] * 4
    assert all("zwx dog" in t.prompt and "zwx" not in str(t.class_prompt) for t in tasks)


def test_every_arm_gets_the_same_seeds_and_the_base_other_ones_for_the_yardstick():
    samples = [Task(f"zwx dog {k}", k, SIZE, f"dog {k}") for k in range(3)]
    general = arms.plain(["a house", "a tree"], size=SIZE, seed=5)
    found = Plan(samples, arms.of_class(["a dog"], size=SIZE, seed=9), general, []).arms()
    assert [t.seed for t in found["base_class"]] == [t.seed for t in found["finetuned"]]
    assert [t.prompt for t in found["base_class"]] == ["dog 0", "dog 1", "dog 2"]
    assert {t.seed for t in found["general/other_seed"]}.isdisjoint(t.seed for t in general)
    assert len(found["prior/base"]) == arms.PRIOR
    assert [arm for arm in found if arms.is_of_base(arm)] == [
        "base",
        "base_class",
        "prior/base",
        "general/base",
        "general/other_seed",
    ]


def test_without_a_subject_there_is_no_class_to_make():
    assert list(Plan([Task("a", 0, SIZE)], [], [], []).arms()) == ["base", "finetuned"]


def test_a_sweep_takes_the_first_picture_of_some_prompts():
    samples = [Task(f"p{k // 4}", k, SIZE) for k in range(80)]
    swept = Plan(samples, [], [], [0.0, 1.0]).swept
    assert len(swept) == arms.SWEPT and len({t.prompt for t in swept}) == arms.SWEPT
    assert all(t.seed % 4 == 0 for t in swept)
