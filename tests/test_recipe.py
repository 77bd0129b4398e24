"""Recipes: what is left out is derived, what is misspelt is named, what is written is read back equal."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from unmask import recipe
from unmask.errors import UserError
from unmask.recipe import Source, schema


def test_every_shipped_recipe_is_valid_and_survives_writing_and_reading(tmp_path: Path) -> None:
    for name in recipe.names():
        resolved = recipe.resolve(recipe.load(name))
        (tmp_path / "again.toml").write_text(recipe.dumps(resolved), "utf-8")
        assert recipe.load(tmp_path / "again.toml") == resolved


def test_a_resolved_recipe_has_no_amount_or_rate_left_open() -> None:
    resolved = recipe.resolve(recipe.load("tiny", ["depth=9"]))
    for section in (resolved.pretrain, resolved.sft, resolved.reward):
        assert section.tokens and section.lr is not None and section.matrix_lr is not None
    assert resolved.rl.tokens and resolved.rl.lr is not None and resolved.rl.critic_lr is not None


def test_resolving_twice_changes_nothing() -> None:
    once = recipe.resolve(recipe.load("tiny"))
    assert recipe.resolve(once) == once


def test_what_is_given_stays_and_later_tokens_are_shares_of_what_is_given_to_the_base() -> None:
    data = recipe.load("tiny", ["pretrain.tokens=1_000_000", "rl.tokens=7000"]).model_dump(mode="json")
    data["sft"]["tokens"] = data["reward"]["tokens"] = None
    resolved = recipe.resolve(recipe.validate(data, "here"))
    sections = (resolved.pretrain, resolved.sft, resolved.reward, resolved.rl)
    assert [section.tokens for section in sections] == [1_000_000, 250_000, 200_000, 7000]


def test_depth_alone_widens_the_model_and_lowers_the_learning_rates() -> None:
    """All of AdamW's by the width; Muon's stays. At 256 they are those that docs/benchmarks.md has figures of."""
    assert [recipe.width_of(depth) for depth in (1, 6, 12, 24)] == [64, 256, 512, 1024]
    for depth, narrow in ((6, 1.0), (12, 0.5)):
        data = recipe.load("tiny", [f"depth={depth}"]).model_dump(mode="json")
        for section, rate in (("sft", "lr"), ("reward", "lr"), ("rl", "lr"), ("rl", "critic_lr")):
            data[section][rate] = None
        found = recipe.resolve(recipe.validate(data, "here"))
        rates = [found.pretrain.lr, found.sft.lr, found.reward.lr, found.rl.lr, found.rl.critic_lr]
        assert rates == pytest.approx([narrow * rate for rate in (6e-3, 1e-3, 3e-4, 3e-5, 1e-4)])
        assert [found.pretrain.matrix_lr, found.sft.matrix_lr, found.reward.matrix_lr] == [0.01, 0.0, 0.0]


def test_a_batch_grows_as_the_root_of_all_tokens_and_the_rates_as_the_root_of_the_batch() -> None:
    """By powers of two, from what docs/benchmarks.md has figures of; one that is given decides the rates too."""
    for tokens, batch, factor in (
        (3_000_000, 4096, 1.0),
        (1_000_000, 2048, 0.5**0.5),
        (64_000_000, 16384, 2.0),
    ):
        found = recipe.resolve(recipe.load("tiny", [f"pretrain.tokens={tokens}"]))
        assert found.pretrain.batch_tokens == batch
        assert [found.pretrain.lr, found.pretrain.matrix_lr] == pytest.approx([6e-3 * factor, 0.01 * factor])
        assert [found.sft.batch_tokens, found.reward.batch_tokens] == [2048, 4096]
    given = recipe.resolve(recipe.load("tiny", ["pretrain.tokens=64_000_000", "pretrain.batch_tokens=4096"]))
    assert [given.pretrain.lr, given.pretrain.matrix_lr] == [6e-3, 0.01]
    for wrong in ("pretrain.batch_tokens=100", "pretrain.batch_tokens=3_000_001", "pretrain.tokens=100"):
        with pytest.raises(UserError, match="a step needs a row of 256 tokens"):
            recipe.resolve(recipe.load("tiny", [wrong]))
    short = recipe.resolve(recipe.load("tiny", ["pretrain.tokens=4_000"]))
    assert short.pretrain.batch_tokens == short.context  # one row at least


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.token=5", "unknown key 'sft.token'. Did you mean 'sft.tokens'?"),
        ("dept=5", "unknown key 'dept'. Did you mean 'depth'?"),
        ("sft.tokens=-5", "sft.tokens"),
        ("depth='six'", "depth"),
        ("nonsense", "--set 'nonsense' is not of the form"),
        ("name=../../etc", "name"),
        ("name.x=1", "--set 'name.x=1': 'name' is not a section of the recipe"),
    ],
)
def test_a_bad_override_is_named_with_what_to_do(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.load("tiny", [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.tokens=abc", "sft.tokens: must be a whole number (given: 'abc')"),
        ("sft.tokens=1.5", "sft.tokens: must be a whole number (given: 1.5)"),
        ("rl.epochs=0", "rl.epochs: must be greater than or equal to 1 (given: 0)"),
        (
            "pretrain.cross_documents=maybe",
            "pretrain.cross_documents: must be true or false (given: 'maybe')",
        ),
        ("sft.lr=inf", "sft.lr: must be a finite number (given: inf)"),
        (
            "seed=99999999999999999999999",
            "seed: must be less than 9223372036854775808 (given: 99999999999999999999999)",
        ),
        ("pretrain.sources=[]", "pretrain.sources: must have at least one entry (given: [])"),
        (
            'sft.sources=[{path="x",shar=1}]',
            "unknown key 'sft.sources.0.shar'. Did you mean 'sft.sources.0.share'?",
        ),
        ("sft.sources=[{share=1}]", "the key 'sft.sources.0.path' is missing"),
        ("sft=3", "sft: must be a section with keys of its own (given: 3)"),
        (
            "tokens=5",
            "unknown key 'tokens'. It is a key elsewhere: pretrain.tokens, sft.tokens, reward.tokens, rl.tokens.",
        ),
        (
            "rl.batch_tokens=5",
            "unknown key 'rl.batch_tokens'. It is a key elsewhere: pretrain.batch_tokens, sft.batch_tokens,"
            " reward.batch_tokens.",
        ),
        (
            'path="x"',
            "unknown key 'path'. It is a key elsewhere: pretrain.sources.path, sft.sources.path,"
            " reward.source.path, rl.sources.path.",
        ),
        (
            "sft.source=5",
            "unknown key 'sft.source'. Did you mean 'sft.sources'? It is a key elsewhere: reward.source.",
        ),
        ("sft.lr=true", "sft.lr: must not be true or false (given: true)"),
        ("rl.epochs=false", "rl.epochs: must not be true or false (given: false)"),
        ("pretrain.cross_documents=1", "pretrain.cross_documents: must be true or false (given: 1)"),
        (f"seed={'9' * 5000}", f"seed: must be a smaller number (given: '{'9' * 79}…)"),
        (
            'sft.sources=[{path="x",label="a b"}]',
            "sft.sources.0.label: may hold letters, digits, '.', '_' and '-', and begins with none of '.' and '-'"
            " (given: 'a b')",
        ),
        (
            'rl.sources=[{path="facts",after_chat=0.5}]',
            "after_chat belongs to the source 'facts' of [sft] alone (given for 'facts')",
        ),
    ],
)
def test_a_bad_value_is_named_once_in_words_that_do_not_speak_of_python(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.load("tiny", [override])
    assert str(caught.value) == f"tiny: {said}"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        recipe.load("tinny")


def test_broken_toml_and_unreadable_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ", "utf-8")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        recipe.load(tmp_path / "broken.toml")
    with pytest.raises(UserError, match="cannot read the recipe"):
        recipe.load(tmp_path / "absent.toml")


def test_facts_as_a_source_need_their_section() -> None:
    data = recipe.load("tiny").model_dump(mode="json") | {"facts": None}
    with pytest.raises(UserError, match=r"no \[facts\] section"):
        recipe.validate(data, "here")


def test_difference_names_the_first_key_that_differs() -> None:
    old, new = ({"sft": {"tokens": tokens, "lr": 1}} for tokens in (5, 6))
    assert recipe.difference(old, new) == "sft.tokens was 5 and is now 6"
    assert recipe.difference(old, old) is None


def test_a_key_that_only_one_side_has_is_a_difference() -> None:
    assert recipe.difference({"sft": {"lr": 1}}, {"sft": {}}) == "sft.lr was 1 and is now None"
    assert recipe.difference({}, {"lr": 1}) == "lr was None and is now 1"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.answer_tokens=256", "rl.answer_tokens is 256: of the context of 256 nothing is left"),
        ("measure.answer_tokens=300", "measure.answer_tokens is 300"),
        ("rl.lr=0", "rl.lr.*greater than 0"),
        ("rl.minibatches=65", "rl.minibatches is 65, for only 64 rl.answers"),
        ('sft.sources=[{path="a/x.jsonl"},{path="b/x.jsonl"}]', "two sources of .sft. are called 'x'"),
        ('sft.sources=[{path="x.jsonl",label="../../x"}]', "label"),
    ],
)
def test_what_can_only_fail_after_hours_is_refused_before_the_first_step(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe.load("tiny", [override])


def test_a_file_is_one_source_however_its_path_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    data = recipe.load("tiny").model_dump(mode="json")
    data["sft"]["sources"] = [{"path": "chats.jsonl", "heldout": 0.3}]
    for spelled in ("./chats.jsonl", str(tmp_path / "chats.jsonl")):
        data["rl"]["sources"] = [{"path": spelled, "heldout": 0.0}]
        with pytest.raises(UserError, match=r"is held out by 0\.3 in \[sft\] and by 0\.0 in \[rl\]"):
            recipe.validate(data, "recipe")


def test_what_is_held_out_of_one_layer_is_held_out_of_all() -> None:
    data = recipe.load("tiny").model_dump(mode="json")
    data["reward"]["source"]["heldout"] = 0.5
    with pytest.raises(
        UserError, match=r"'chitchat' is held out by 0\.2 in \[pretrain\] and by 0\.5 in \[reward\]"
    ):
        recipe.validate(data, "here")


@pytest.mark.parametrize("path", ["/data/.notes.jsonl", "../x/..jsonl", "hf://a/b:c#d", "a b/ü.txt"])
def test_a_name_that_was_not_given_stays_inside_the_run(path: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", Source(path=path).name)


def test_a_recipe_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b'\xff\xfename = "x"')
    with pytest.raises(UserError, match="not UTF-8"):
        recipe.load(tmp_path / "x.toml")


def test_the_table_of_keys_has_every_key_with_its_default() -> None:
    """A key of pretrain, sft and reward alike stands once; those of rl as `rl.KEY`, or in its heading."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text("utf-8").split("## All keys")[1]
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", text, re.MULTILINE))
    [heading] = re.findall(r"^\| \*\*\[rl\]\*\*.*", text, re.MULTILINE)
    sections: list[tuple[str, type[BaseModel]]] = [
        ("", schema.Recipe),
        ("tokenizer.", schema.TokenizerSection),
    ]
    sections += [("facts.", schema.FactsSection), ("", schema.Source), ("", schema.Training)]
    sections += [("pretrain.", schema.PretrainSection), ("sft.", schema.SftSection)]
    sections += [
        ("reward.", schema.RewardSection),
        ("rl.", schema.RlSection),
        ("measure.", schema.MeasureSection),
    ]
    wanted = {}
    for prefix, section in sections:
        for key, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            inherited = section is not schema.Training and key in schema.Training.model_fields
            if is_section or (inherited and prefix != "rl.") or key in ("sources", "source", "facts"):
                continue
            if prefix == "rl." and f"`{key}`" in heading:
                continue
            wanted[f"{prefix}{key}"] = field
    assert wanted.keys() == rows.keys()
    for key, field in wanted.items():
        if not field.is_required() and isinstance(field.default, bool | int | float):
            assert rows[key] == str(field.default).lower(), key
        assert (rows[key] == "must be given") == field.is_required(), key
    assert schema.RlSection.model_fields["warmup"].default == 0.05  # what the heading says
