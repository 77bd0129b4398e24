"""A chat template can neither reach out of its sandbox nor run or grow without end."""

import time

import pytest

from unmask.errors import UserError
from unmask.text.template import CHATML, render_text

MESSAGES = [{"role": "user", "content": "hi"}]


def rendered(template: str) -> str:
    return render_text(template, MESSAGES, {"bos_token": "<s>"}, open_turn=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include 'secrets' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% for message in messages %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_reach_out_or_are_broken_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        rendered(template)
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
        "{{ 'x' * 300000000 }}",
        "{{ 300000000 * 'x' }}",
        "{{ ([1] * 9999) * 99999 }}",
        "{{ 9 ** 99999999 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' }}" + " " * 300_000,
        "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    ],
)
def test_templates_that_run_or_grow_without_end_are_stopped(template: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="chat template"):
        rendered(template)
    assert time.process_time() - start < 10


def test_the_bounds_are_of_one_rendering_not_of_all() -> None:
    half = "{% for i in range(99999) %}{% endfor %}"
    for _ in range(3):
        assert rendered(half) == ""


def test_loops_keep_what_jinja_says_about_them() -> None:
    said = "{% for m in messages * 3 %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}"
    assert rendered(said) == "1TrueFalse3 2FalseFalse3 3FalseTrue3 "
    assert rendered("{% for i in [3, 1] %}{{ i }}{% else %}none{% endfor %}") == "31"
    assert rendered("{% for i in [] %}{{ i }}{% else %}none{% endfor %}") == "none"
    assert rendered("{% for i in [1, 2, 3] if i != 2 %}{{ i }}{% endfor %}") == "13"
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_joining_and_multiplying_small_things_works_as_in_jinja() -> None:
    assert rendered(
        "{{ 1 ~ 'a' ~ none }}|{{ 'ab' * 2 }}|{{ 2 * 3 }}|{{ 'a' + 'b' }}|{{ 1 + 2 }}|{{ [1] + [2] }}"
    ) == ("1aNone|abab|6|ab|3|[1, 2]")


def test_what_other_templates_use_is_there() -> None:
    assert (
        rendered("{{ bos_token }}{% generation %}a{{ 1 }}{% endgeneration %}{{ tools is none }}")
        == "<s>a1True"
    )
    assert rendered("{%- if strftime_now is defined %}now{% else %}a fixed date{% endif %}") == "a fixed date"
    assert rendered("  {% if add_generation_prompt %}\nx\n  {% endif %}\ny") == "x\ny"


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(UserError, match="turns must alternate"):
        rendered("{{ raise_exception('turns must alternate') }}")


def test_no_template_is_said() -> None:
    with pytest.raises(UserError, match="no chat template"):
        rendered("")


def test_ours_is_plain_chatml() -> None:
    assert rendered(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
