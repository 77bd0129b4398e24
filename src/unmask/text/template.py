"""Chat templates as text: Jinja in a sandbox, with bounds on what it may do and how much it may make.

A template comes with a model and is untrusted. The sandbox keeps it from everything outside; the bounds
keep an endless loop or a huge string from stopping the process. What it cannot bound is one filter that
makes a huge string by itself, so no template is ever taken from a request.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from unmask.errors import UserError

# Plain ChatML, without a default system prompt: a conversation's beginning is rendered the same however it
# goes on.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MAX_SOURCE = 256 * 1024  # characters; the longest in use have some 30,000
_MAX_TEXT = 4 * 1024 * 1024  # characters, of the result and of any string on the way
_MAX_WORK = 200_000  # calls and turns of loops in one rendering
_LONG = (str, list, tuple)  # what can be made long by adding and multiplying


def render_text(
    template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], *, open_turn: bool
) -> str:
    """The text that a template makes of messages. `names`: bos_token and the like.

    Raises UserError if the template is empty, broken, reaches for what it may not, grows beyond the bounds,
    or refuses the messages (`raise_exception`).
    """
    if not template:
        raise UserError(
            "this model has no chat template (chat_template.jinja), so it cannot chat. Give plain text: --plain."
        )
    try:
        with _lock:
            _environment.left = _MAX_WORK
            return "".join(
                _within_bounds(
                    _compiled(template).generate(
                        messages=[dict(message) for message in messages],
                        add_generation_prompt=open_turn,
                        tools=None,
                        documents=None,
                        **names,
                    )
                )
            )
    # A template raises whatever its expressions raise: TypeError, RecursionError, …
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"the chat template cannot render these messages: {reason}") from error


def _within_bounds(chunks: Iterable[str]) -> Iterator[str]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > _MAX_TEXT:
            raise SecurityError(f"its result is longer than {_MAX_TEXT} characters")
        yield chunk


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which some templates mark the assistant's words: the words."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which also counts calls and turns of loops, and measures strings before they are made."""

    intercepted_binops = frozenset({"+", "*", "**"})
    left = 0

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise SecurityError(f"it takes more than {_MAX_WORK} steps")

    def bounded(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def joined(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        _refuse_long(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it raises to a power")
        if operator == "+" and isinstance(left, _LONG) and isinstance(right, _LONG):
            _refuse_long(len(left) + len(right))
        elif operator == "*" and isinstance(left, _LONG) and isinstance(right, int):
            _refuse_long(len(left) * right)
        elif operator == "*" and isinstance(left, int) and isinstance(right, _LONG):
            _refuse_long(left * len(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _refuse_long(left.bit_length() + right.bit_length())
        return super().call_binop(context, operator, left, right)


class _Bounding(NodeTransformer):
    """Every `for` counts its turns, and every `~` measures what it joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _call("bounded", [cast(nodes.Expr, node.iter)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("joined", node.nodes)


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _refuse_long(length: int) -> None:
    if length > _MAX_TEXT:
        raise SecurityError(f"it makes something of {length} characters or parts; {_MAX_TEXT} is the most")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _new_environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    # `strftime_now` is left undefined on purpose: templates then use a fixed date, and equal messages stay
    # equal.
    raise_exception: Callable[[str], NoReturn] = _raise_exception
    environment.globals["raise_exception"] = raise_exception
    return environment


_environment = _new_environment()
_lock = threading.Lock()  # the count of what is left is the environment's


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    if len(template) > _MAX_SOURCE:
        raise SecurityError(f"it is longer than {_MAX_SOURCE} characters")
    tree = _Bounding().visit(_environment.parse(template))
    code = _environment.compile(tree)
    return Template.from_code(_environment, code, _environment.make_globals(None))
