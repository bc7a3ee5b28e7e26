"""Items of manifests: none is left out in silence."""

import json

import pytest
from helpers.manifests import assistant, user, write

from phi4mm_jax import InputError
from phi4mm_jax.evaluation.items import read_items


def test_items_of_a_manifest(tmp_path):
    image = {"type": "image", "image": "a.png"}
    lines = [
        {"messages": [user("A?"), assistant("a")], "id": "first"},
        "",
        {"messages": [user("A?"), assistant("a"), user(image, "B?"), assistant("b")], "answers": ["c", "b"]},
        {"messages": [user("A?")], "answers": ["a", ""]},
        {"messages": json.dumps([user("A?"), assistant("a")])},
    ]
    first, second, third, fourth = read_items(write(tmp_path / "m.jsonl", lines))
    assert (first.where, first.id, first.references) == (f"{tmp_path}/m.jsonl: line 1", "first", ("a",))
    assert (second.where, second.references) == (f"{tmp_path}/m.jsonl: line 3", ("b", "c"))
    assert [m["role"] for m in second.prompt] == ["user", "assistant", "user"]
    assert second.prompt[-1]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}
    assert third.references == ("a", "")
    assert fourth.prompt == first.prompt
    assert len(read_items(tmp_path / "m.jsonl", 2)) == 2


def test_a_completion_is_the_reference(tmp_path):
    """As training reads it; beside messages it is refused."""
    line = {"prompt": [user("A?"), assistant("a"), user("B?")], "completion": [assistant("b")]}
    (item,) = read_items(write(tmp_path / "m.jsonl", [line]))
    assert ([m["role"] for m in item.prompt], item.references) == (["user", "assistant", "user"], ("b",))
    with pytest.raises(InputError, match="has messages, and a prompt with its completion; leave one out"):
        read_items(write(tmp_path / "both.jsonl", [{**line, "messages": [user("C?"), assistant("c")]}]))


def test_some_items_are_from_all_over_the_manifest(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?"), assistant(str(i))]} for i in range(9)])
    assert [item.references for item in read_items(path, 3)] == [("0",), ("3",), ("6",)]
    assert [item.references for item in read_items(path, 20)] == [(str(i),) for i in range(9)]


def test_items_in_the_forms_of_other_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    shown = [{"type": "image"}, {"type": "text", "text": "A?", "image": None}]
    lines = [
        {"messages": [{"role": "user", "content": "<image>A?"}, assistant("a")], "images": ["a.png"], "answers": None},
        {"conversations": [{"from": "human", "value": "<image>A?"}, {"from": "gpt", "value": "a"}], "image": "a.png"},
        {"messages": [{"role": "user", "content": shown}, assistant([{"type": "text", "text": "a"}])],
         "images": [{"bytes": None, "path": "a.png"}]},
        {"messages": [user("A?"), assistant("a")], "tools": [tool], "system": "s"},
    ]  # fmt: skip
    items = read_items(write(tmp_path / "m.jsonl", lines))
    assert all(item.references == ("a",) for item in items)
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    plain = [{"role": "user", "content": [image, {"type": "text", "text": "A?"}]}]
    assert items[0].prompt == items[1].prompt == plain
    (asked,) = items[2].prompt
    stored = {"type": "image", "image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    assert asked["content"] == [stored, {"type": "text", "text": "A?", "image": None}]
    assert items[3].prompt == [{"role": "system", "content": "s", "tools": [tool]}, user("A?")]
    broken = [{**lines[0], "images": []}, {**lines[0], "images": None, "image_path": "a.png"}]
    with pytest.raises(InputError, match=r"line 1: .*1 place.*0 image.*line 2: 'image_path' looks like media"):
        read_items(write(tmp_path / "broken.jsonl", broken))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("oops", "the line is not JSON"),
        ([], "the item is a list"),
        ({}, "messages is missing or empty"),
        ({"messages": [user("A?")]}, 'no reference; end the messages with one of role assistant, or give "answers"'),
        ({"messages": [user("A?")], "answers": []}, "no reference"),
        ({"messages": [user("A?")], "answers": "a"}, "answers is 'a'; expected a list of strings"),
        ({"messages": [user("A?")], "answers": [1]}, "expected a list of strings"),
        ({"messages": [user("A?"), assistant([])]}, "the answer is not plain text"),
        ({"messages": [assistant("a")]}, "nothing before the answer"),
    ],
)
def test_what_cannot_be_measured_is_an_error(tmp_path, line, cause):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?"), assistant("a")]}, line])
    with pytest.raises(InputError) as raised:
        read_items(path)
    assert str(raised.value).startswith(f"{path}: line 2: ")
    assert cause in str(raised.value)


def test_all_lines_without_a_reference_are_told_at_once(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?")]}] * 9)
    with pytest.raises(InputError, match=r"line 1: no reference.*line 5: no reference.*; and 4 more lines\. Repair"):
        read_items(path)
