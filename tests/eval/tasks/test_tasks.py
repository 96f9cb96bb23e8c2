"""Every task of the table: lengths, seeds, forms, answers that are there, and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longswift.core.errors import ConfigError, InputError
from longswift.eval import tasks
from longswift.eval.models import Codec
from longswift.eval.tasks.base import DoesNotFit, Output, Sample, Task

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
FORMS = [(name, form) for name in tasks.list_tasks() for form in tasks.TASKS.get(name).forms]
# Their documents have exactly the tokens that the length leaves.
EXACT = ("needle", "needle_multikey", "needle_multivalue", "needle_multiquery", "passkey", "copy")


@pytest.fixture(scope="session")
def codec(model_directory: Path) -> Codec:
    from transformers import AutoTokenizer

    return Codec(tokenizer=AutoTokenizer.from_pretrained(model_directory))


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    lines = [
        {
            "document": f"The colour of box {i} is {colour}. "
            + "Nothing else is known of it. " * 4,
            "question": f"What is the colour of box {i}?",
            "answer": [colour, f"a {colour} one"],
        }
        for i, colour in enumerate(("blue", "green", "red", "black"))
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return str(file)


def make(name: str, questions: str, **options: Any) -> Task:
    return tasks.get_task(name, **({"file": questions} if name == "qa" else {}), **options)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_sample_fits_repeats_and_differs_from_the_next(
    name: str, form: str, codec: Codec, questions: str
) -> None:
    task = make(name, questions, form=form)
    for length in (2000, 2600):
        first, second = (task.generate(codec, length, i) for i in (0, 1))
        assert first == task.generate(codec, length, 0)
        assert first.document != second.document
        assert first.tokens <= length and first.meta["form"] == form
        if name in EXACT:
            assert first.tokens == length
        elif name != "qa":
            assert first.tokens > 0.85 * length
    reseeded = make(name, questions, form=form, seed=1).generate(codec, 2600, 0)
    if name != "perplexity" and name != "qa":
        assert reseeded.document != task.generate(codec, 2600, 0).document


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_right_answers_are_in_the_document_and_score_one(
    name: str, form: str, codec: Codec, questions: str
) -> None:
    if name == "perplexity":
        pytest.skip("asks nothing")
    task = make(name, questions, form=form)
    sample = task.generate(codec, 2000, 2)
    text = codec.decode(sample.document)
    for question in sample.questions:
        # Of alternatives one is enough.
        wanted = question.answers[:1] if name == "qa" else question.answers
        assert all(answer in text for answer in wanted)
        assert len(codec.encode(", ".join(wanted))) <= question.limit
        assert not question.at or len(question.at) in (1, len(question.answers))
    right = tuple(_say(task, q.answers) for q in sample.questions)
    scores = task.score(sample, Output(texts=right))
    assert {score.metric for score in scores} == set(task.metrics)
    assert all(score.value == 1 for score in scores)
    asked = len(sample.questions) * len(task.metrics)
    assert sum(score.weight for score in scores) == pytest.approx(asked)
    wrong = task.score(sample, Output(texts=("nothing of it",) * len(sample.questions)))
    assert all(score.value == 0 for score in wrong)


def _say(task: Task, answers: tuple[str, ...]) -> str:
    return answers[0] if task.name == "qa" else ", ".join(answers)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_too_short_a_length_is_refused_and_nothing_cut(
    name: str, form: str, codec: Codec, questions: str
) -> None:
    if name == "perplexity":
        pytest.skip("any two tokens can be predicted")
    with pytest.raises(DoesNotFit, match=r"never truncated"):
        make(name, questions, form=form).generate(codec, 30, 0)


@pytest.mark.parametrize("name", tasks.list_tasks())
def test_a_task_survives_json_and_has_its_line_in_the_docs(name: str, questions: str) -> None:
    task = make(name, questions, seed=3)
    assert tasks.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert f"| `{name}` |" in DOCS.read_text(encoding="utf-8")
    assert task.__doc__ and type(task).__module__.startswith("longswift.eval.tasks.")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nedle", {}),
        ("needle", {"form": "sung"}),
        ("needle", {"haystack": "sand"}),
        ("needle", {"queries": 2}),
        ("needle", {"keys": 0}),
        ("needle", {"value": "names"}),
        ("kv", {"questions": 0}),
        ("copy", {"cue": 32}),
        ("common_words", {"common_times": 3}),
        ("frequent_words", {"alpha": 1}),
        ("variable_tracking", {"form": "key_value"}),
        ("perplexity", {"stride": 0}),
        ("perplexity", {"form": "instruct"}),
        ("qa", {}),
        ("passkey", {"colour": "red"}),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        tasks.get_task(name, **options)
    assert "\n" not in str(error.value)


def _where(codec: Codec, sample: Sample, text: str) -> float:
    whole = codec.decode(sample.document)
    assert whole.count(text) == 1
    return whole.index(text) / len(whole)


@pytest.mark.parametrize("haystack", ["text", "noise", "needles"])
def test_needles_lie_where_they_say(codec: Codec, haystack: str) -> None:
    task = tasks.get_task("needle", haystack=haystack, form="continuation", depths=5)
    seen = set()
    for index in range(5):
        sample = task.generate(codec, 2000, index)
        (question,) = sample.questions
        sentence = f"{codec.decode(question.ids).rstrip()} {question.answers[0]}."
        assert abs(_where(codec, sample, sentence) - question.at[0]) < 0.1
        seen.add(question.at[0])
    assert seen == {0, 0.25, 0.5, 0.75, 1}


def test_several_needles(codec: Codec) -> None:
    text = codec.decode(tasks.get_task("needle_multikey").generate(codec, 1500, 0).document)
    assert text.count("The secret number of") == 4
    values = tasks.get_task("needle_multivalue", form="instruct").generate(codec, 1500, 0)
    (question,) = values.questions
    assert len(set(question.answers)) == 4
    half = tasks.get_task("needle_multivalue").score(
        values, Output(texts=(" and ".join(question.answers[:2]),))
    )
    assert sum(score.value * score.weight for score in half) == pytest.approx(0.5)
    # Without instructions each value is asked behind sentences with all the others.
    several = tasks.get_task("needle_multivalue", form="continuation").generate(codec, 1500, 0)
    told = [q.answers[0] for q in several.questions]
    for question in several.questions:
        asked = codec.decode(question.ids)
        assert [value for value in told if value not in asked] == [question.answers[0]]
    only = tasks.get_task("needle", haystack="needles", value="uuids", form="instruct")
    needles = codec.decode(only.generate(codec, 2000, 0).document)
    assert needles.count("The secret code of") > 10


def test_a_chain_of_variables_leads_to_its_number(codec: Codec) -> None:
    sample = tasks.get_task("variable_tracking", chains=2, form="instruct").generate(codec, 2000, 0)
    text, (question,) = codec.decode(sample.document), sample.questions
    found = dict(part.split(".")[0].split(" = ") for part in text.split(" VAR ")[1:])
    assert len(found) == 10 and len(question.answers) == 5
    for hops, name in enumerate(question.answers):
        value, steps = found[name], 0
        while not value.isdigit():
            value, steps = found[value], steps + 1
        assert steps == hops == question.at[hops] and value in codec.decode(question.ids)
    places = [text.index(f" VAR {name} = ") for name in question.answers]
    assert places == sorted(places)


def test_common_and_frequent_words_are(codec: Codec) -> None:
    task = tasks.get_task("common_words", form="continuation")
    sample = task.generate(codec, 7000, 0)
    listed = codec.decode(sample.document).rpartition("Numbered words:\n")[2].split()[1::2]
    common = sample.questions[0].answers
    assert {listed.count(word) for word in common} == {30}
    assert {listed.count(word) for word in set(listed) - set(common)} == {3}
    sample = tasks.get_task("frequent_words").generate(codec, 2000, 0)
    words = codec.decode(sample.document).split()
    most = sorted(set(words), key=words.count, reverse=True)
    assert most[0] == "..." and tuple(most[1:4]) == sample.questions[0].answers
    assert words.count(most[0]) == pytest.approx(4 * words.count(most[1]), rel=0.05)


def test_a_copy_is_scored_word_by_word(codec: Codec) -> None:
    task = tasks.get_task("copy")
    sample = task.generate(codec, 1000, 0)
    words = sample.questions[0].answers[0].split()
    words[0] = "different"
    by_metric = {s.metric: s.value for s in task.score(sample, Output(texts=(" ".join(words),)))}
    assert by_metric == {"words": pytest.approx(1 - 1 / len(words)), "exact": 0.0}


def test_questions_are_surrounded_by_other_documents(codec: Codec, questions: str) -> None:
    task = make("qa", questions)
    whole = codec.decode(task.generate(codec, 2000, 1).document)
    assert all(f"box {i} is" in whole for i in range(4))
    alone = codec.decode(make("qa", questions, others=False).generate(codec, 2000, 1).document)
    assert "box 1 is" in alone and "box 0" not in alone
    assert task.available(codec, 2000, 100) == 4
    with pytest.raises(InputError, match="from 0 to 3"):
        task.generate(codec, 2000, 4)


@pytest.mark.parametrize(
    ("said", "f1", "exact"),
    [("The Blue!", 1, 1), ("blue or green", 0.5, 0), ("", 0, 0), ("blue\nNext question", 1, 1)],
)
def test_answers_are_compared_as_squad_does(
    said: str, f1: float, exact: float, codec: Codec, questions: str
) -> None:
    task = make("qa", questions)
    scores = task.score(task.generate(codec, 2000, 0), Output(texts=(said,)))
    assert {s.metric: s.value for s in scores} == {"f1": pytest.approx(f1), "exact": exact}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no JSON"),
        ("[1]", "a list"),
        ('{"document": "a", "question": "b"}', "no answer"),
        ('{"document": "a", "question": "b", "answer": 7}', "empty or no text"),
        ('{"document": "a", "question": "b", "answer": []}', "empty or no text"),
        ('{"document": " ", "question": "b", "answer": "c"}', "empty or no text"),
    ],
)
def test_malformed_questions_are_named_by_their_line(
    line: str, why: str, codec: Codec, tmp_path: Path
) -> None:
    file = tmp_path / "qa.jsonl"
    good = '{"document": "a", "question": "b", "answer": "c"}'
    file.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(InputError, match="line 3") as error:
        tasks.get_task("qa", file=str(file)).available(codec, 100, 5)
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stride", [None, 16, 40])
def test_perplexity_scores_every_token_once(codec: Codec, tmp_path: Path, stride: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One sentence follows another, and then a third. " * 20)
    task = tasks.get_task("perplexity", file=str(file), stride=stride, parts=4)
    length, begin = 65, len(codec.begin())
    ids = codec.encode(file.read_text())
    windows = task.available(codec, length, 1000)
    body = length - begin
    step = stride or body
    assert windows == 1 + (len(ids) - body) // step
    weight = 0.0
    for index in range(windows):
        sample = task.generate(codec, length, index)
        assert list(sample.document[begin:]) == ids[index * step : index * step + body]
        scores = task.score(sample, Output(losses=[2.0] * (length - 1)))
        assert all(score.value == 2 for score in scores)
        weight += sum(score.weight for score in scores)
    # The tokenizer begins a text with a token of its own, so the first one is predicted, too.
    assert begin == 1 and weight == body + (windows - 1) * step


def test_perplexity_needs_enough_text(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("A few words only.")
    with pytest.raises(InputError, match="at least"):
        tasks.get_task("perplexity", file=str(file)).available(codec, 1000, 1)
    with pytest.raises(InputError, match="stride"):
        tasks.get_task("perplexity", stride=2000).available(codec, 1000, 1)
