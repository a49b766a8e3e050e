"""Conversations as token ids, with a mask that says which of them are an answer to learn.

A chat template says what stands before and after each role's text. Here it is a table (`TEMPLATES`). The token ids, the
loss mask, the stop ids and the Jinja text that other programs render all come from that table, so they cannot disagree.

    conversation -> check_messages -> parts: [(text or Special, learn)] -> ids, mask

A foreign model may bring a template of its own as Jinja, a small programming language. It is rendered, and the parts
are read off the result (`jinja_parts`); the rest is the same.

The tokenizer is an argument here: this file knows of it only its special tokens and how it encodes a stretch of text.
"""

from __future__ import annotations

from settings import UserError

import itertools
import json
import re
import sys
import time
from dataclasses import dataclass, replace

ROLES = ("system", "user", "assistant")

# ----------------------------------------------------------------------------------------------------------------------
# The tables.


@dataclass(frozen=True)
class Special:
    """A special token in a template, by its text. "bos" and "eos" stand for the tokenizer's own."""

    name: str


@dataclass(frozen=True)
class Turn:
    prefix: tuple  # of str (plain text) and Special
    suffix: tuple


@dataclass(frozen=True)
class Template:
    """For every role a prefix and a suffix.

    In an assistant turn the loss counts the text and the suffix up to its last special token: the model has to learn to
    end its turn, but not the newline that `chatml` puts between turns.
    """

    system: Turn
    user: Turn
    assistant: Turn
    start: tuple = ()  # before the first message
    end: tuple | None = None  # closes the last turn, in place of its suffix's last item; None: it ends like the others
    answer_lead: str = ""  # what the answer itself begins with: Llama-2's space is part of the answer's first token
    system_in_user: bool = False  # the system text stands inside the first user turn, so that one's prefix falls away
    any_order: bool = False  # roles may repeat and system texts may stand anywhere; else user and assistant alternate


BOS, EOS = Special("bos"), Special("eos")


def _chatml(role: str) -> Turn:
    return Turn((Special("<|im_start|>"), f"{role}\n"), (Special("<|im_end|>"), "\n"))


def _chatml_65b(role: str) -> Turn:
    return Turn((Special("<|im_start|>"), f"{role}\n"), ("\n", Special("<|im_end|>"), "\n"))


def _llama3(role: str) -> Turn:
    header = (Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n")
    return Turn(header, (Special("<|eot_id|>"),))


TEMPLATES = {
    # Baby-Llama2-Chinese: prompt <bos> answer <eos>, each segment encoded by itself. Its data has no system text;
    # ours stands on a line of its own before the first prompt.
    "baby": Template(
        system=Turn((), ("\n",)), user=Turn((), ()), assistant=Turn((BOS,), (EOS,))
    ),
    "chatml": Template(
        system=_chatml("system"), user=_chatml("user"), assistant=_chatml("assistant"), any_order=True
    ),
    # chinese-llama-65b's dialog_dataset.py: a newline before <|im_end|> and none after the last, BOS and EOS around the
    # whole. (transformers before 4.34 dropped newlines next to special tokens when it encoded such a text; later ones and
    # we keep them.)
    "chatml-65b": Template(
        system=_chatml_65b("system"), user=_chatml_65b("user"), assistant=_chatml_65b("assistant"),
        start=(BOS,), end=(EOS,), any_order=True,
    ),
    # Meta's llama/generation.py. It strips the texts first; we leave them as they are.
    "llama2": Template(
        system=Turn((BOS, "[INST] <<SYS>>\n"), ("\n<</SYS>>\n\n",)),
        user=Turn((BOS, "[INST] "), (" [/INST]",)),
        assistant=Turn((), (" ", EOS)),
        answer_lead=" ",
        system_in_user=True,
    ),
    # Meta's llama3/tokenizer.py, ChatFormat.
    "llama3": Template(
        system=_llama3("system"), user=_llama3("user"), assistant=_llama3("assistant"), start=(BOS,), any_order=True
    ),
}


def jinja_text(template: Template) -> str:
    """The template as Jinja, for `tokenizer_config.json`: other programs render the same text from it."""

    def word(item) -> str:
        if item in (BOS, EOS):
            return f"{item.name}_token"
        return json.dumps(item.name if isinstance(item, Special) else item, ensure_ascii=False)

    def put(items) -> str:
        return f"{{{{ {' + '.join(map(word, items))} }}}}" if items else ""

    def close(turn: Turn) -> str:
        if template.end is None:
            return put(turn.suffix)
        return (put(turn.suffix[:-1]) + "{% if loop.last and not add_generation_prompt %}" + put(template.end) + "{% else %}"
                + put(turn.suffix[-1:]) + "{% endif %}")  # fmt: skip

    content = "{{ message['content'] }}"
    user_prefix = put(template.user.prefix)
    if template.system_in_user:
        user_prefix = ("{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}" + user_prefix
                       + "{% endif %}")  # fmt: skip
    lead = (template.answer_lead,) if template.answer_lead else ()
    return (
        put(template.start)
        + "{% for message in messages %}{% if message['role'] == 'system' %}"
        + put(template.system.prefix) + content + close(template.system)
        + "{% elif message['role'] == 'user' %}" + user_prefix + content + close(template.user)
        + "{% elif message['role'] == 'assistant' %}"
        + put(template.assistant.prefix) + put(lead) + content + close(template.assistant)
        + "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
        + ("{% if add_generation_prompt %}" + put(template.assistant.prefix) + "{% endif %}"
           if template.assistant.prefix else "")
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Rendering. `name` is a key of TEMPLATES, or "jinja" for the tokenizer's own.


def render(tokenizer, messages, name: str, add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation: see Tokenizer.render.

    Runs of text are encoded whole, but cut where an answer begins or ends, so that no token straddles it.
    """
    ids, mask, after_text = [], [], False
    parts = _parts(tokenizer, messages, name, add_generation_prompt)
    for (is_special, learn), run in itertools.groupby(parts, lambda part: (isinstance(part[0], Special), part[1])):
        if is_special:
            new = [_special_id(tokenizer, item) for item, _ in run]
        else:
            text = "".join(item for item, _ in run)
            if not text:
                continue
            new = tokenizer.encode_segment(text, continued=after_text)
        after_text = not is_special
        ids += new
        mask += [learn] * len(new)
    return ids, mask


def stop_ids(tokenizer, name: str) -> list[int]:
    """The ids that end an answer: EOS and the template's end of turn."""
    sample = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    parts = _parts(tokenizer, sample, name, add_generation_prompt=False)
    ends = [_special_id(tokenizer, item) for item, learn in parts if learn and isinstance(item, Special)]
    return sorted({*ends, tokenizer.eos_id} - {None})


def closing_text(tokenizer, name: str) -> str:
    """What a model writes between its answer and the token that ends it, by the template: no part of what it said."""
    suffix = () if name == "jinja" else fitted(tokenizer, name).assistant.suffix
    return "".join(itertools.takewhile(lambda item: isinstance(item, str), suffix))


def check_name(tokenizer, name: str) -> str:
    """`name` if it is a chat template that this tokenizer can render; else UserError."""
    if name not in (*TEMPLATES, "jinja"):
        raise UserError(f"there is no chat template {name!r}; there are {', '.join(TEMPLATES)}, and jinja for a "
                        "tokenizer directory that brings its own")
    if name == "jinja" and not tokenizer.jinja:
        raise UserError(f"the chat template jinja was asked for, but the tokenizer brings none of its own; choose one "
                        f"of {', '.join(TEMPLATES)}")
    return name


def _parts(tokenizer, messages, name: str, add_generation_prompt: bool) -> list:
    """A conversation as [(text or Special, learn)]: the one place where the loss mask is decided."""
    if name == "jinja":
        return jinja_parts(tokenizer, messages, add_generation_prompt)
    check_messages(messages, TEMPLATES[name], add_generation_prompt)
    template = fitted(tokenizer, name)
    parts = [(item, 0) for item in template.start]
    previous = None
    for message in messages:
        role = message["role"]
        turn = getattr(template, role)
        if not (template.system_in_user and role == "user" and previous == "system"):
            parts += [(item, 0) for item in turn.prefix]
        learn = int(role == "assistant")
        parts.append(((template.answer_lead if learn else "") + message["content"], learn))
        end = max((i for i, item in enumerate(turn.suffix) if isinstance(item, Special)), default=len(turn.suffix))
        parts += [(item, int(learn and i <= end)) for i, item in enumerate(turn.suffix)]
        previous = role
    if add_generation_prompt:
        parts += [(item, 0) for item in template.assistant.prefix]
    elif template.end is not None:
        parts[-1:] = [(item, 0) for item in template.end]
    return parts


def _special_id(tokenizer, item: Special) -> int:
    own = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    return own[item] if item in own else tokenizer.special_tokens[item.name]


_WARNED = set()


def fitted(tokenizer, name: str, warn: bool = True) -> Template:
    """The template with this tokenizer's own special tokens. Those it lacks are spelled as text.

    If no special token would be left to end an answer, EOS does: a model must be able to stop.
    """
    template, missing = TEMPLATES[name], []

    def fit(item):
        if item in (BOS, EOS):
            if (tokenizer.bos_id if item == BOS else tokenizer.eos_id) is None:
                raise UserError(f"the chat template {name} needs a {item.name.upper()} token, which this tokenizer has "
                                "not")
        elif isinstance(item, Special) and item.name not in tokenizer.special_tokens:
            missing.append(item.name)
            return item.name
        return item

    turns, start, end = {}, tuple(map(fit, template.start)), template.end
    for role in ROLES:
        turn = getattr(template, role)
        turns[role] = Turn(tuple(map(fit, turn.prefix)), tuple(map(fit, turn.suffix)))
    suffix = turns["assistant"].suffix
    if not any(isinstance(item, Special) for item in suffix) and tokenizer.eos_id is not None:
        mark = next(i for i, item in enumerate(template.assistant.suffix) if isinstance(item, Special))
        turns["assistant"] = replace(turns["assistant"], suffix=(*suffix[: mark + 1], EOS, *suffix[mark + 1 :]))
        end = end and tuple(item for item in end if item != EOS)  # the answer has brought it
    if missing and warn and (name, tokenizer.fingerprint) not in _WARNED:
        _WARNED.add((name, tokenizer.fingerprint))
        print(f"warning: the tokenizer has no {', '.join(dict.fromkeys(missing))}; the chat template {name} spells "
              "them as text, several tokens each", file=sys.stderr)
    return replace(template, start=start, end=end, **turns)


def check_messages(messages, template: Template | None = None, add_generation_prompt: bool = False) -> None:
    """Raises UserError naming the first message that is malformed, or out of order for `template`."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"a conversation is a list of messages, not {_shorten(messages)}")
    previous = None
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f'{where} is {_shorten(message)}, but needs {{"role": …, "content": …}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            if template is None and isinstance(role, str):  # a foreign template may know more roles ("tool")
                continue
            raise UserError(f"{where} has the unknown role {_shorten(role)}; there are system, user and assistant")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where} ({role}) has no text: its content is {_shorten(content)}")
        if role == "assistant" and previous in (None, "system"):
            raise UserError(f"{where} is the assistant's, but no user message comes before it")
        if template and not template.any_order:
            if role == "system" and previous is not None:
                raise UserError(f"{where} is a system message; this chat template takes it only as the first")
            if role == previous:
                raise UserError(f"{where} has the role {role} like the one before; user and assistant must alternate")
        # In a lenient template a system text between the turns does not count as a turn.
        previous = role if not (template and template.any_order and role == "system" and previous) else previous
    if previous == "system":
        raise UserError("the conversation holds only a system message; a user message must follow")
    if template and add_generation_prompt and previous != "user":
        raise UserError("an answer is asked for, but the last message is not the user's")


def _shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ----------------------------------------------------------------------------------------------------------------------
# Foreign templates.


def recognise(tokenizer) -> str | None:
    """Which of our templates the tokenizer's Jinja text is, "jinja" if none, None if there is no such text."""
    if not tokenizer.jinja:
        return None
    for name in TEMPLATES:
        try:
            if jinja_text(fitted(tokenizer, name, warn=False)) == tokenizer.jinja.strip("\n"):
                return name
        except UserError:  # the template needs a BOS that this tokenizer has not
            continue
    return "jinja"


def jinja_parts(tokenizer, messages, add_generation_prompt: bool) -> list:
    """The parts by rendering Jinja. An answer is what appears when its message is added to the messages before it; with
    add_generation_prompt nothing is to be learned.

    Special-token text inside a message must stay plain text, but the template mixes it with its own. So a guard
    character breaks it before rendering and is taken out afterwards; templates that trim or split still work.
    """
    check_messages(messages)
    used = "".join(message["content"] for message in messages if isinstance(message["content"], str))
    guard = next(chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in used)  # U+FDD0…: no characters
    longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
    specials = re.compile("|".join(map(re.escape, longest_first)))
    messages = [
        {**message, "content": specials.sub(lambda match: match[0][0] + guard + match[0][1:], message["content"])}
        if isinstance(message["content"], str) else message for message in messages
    ]  # fmt: skip

    whole = _run_jinja(tokenizer, messages, add_generation_prompt)
    spans, done = [], 0  # (start, end, learn) of stretches of the rendered text
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or add_generation_prompt:
            continue
        before, after = _run_jinja(tokenizer, messages[:i], True), _run_jinja(tokenizer, messages[: i + 1], False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError("the tokenizer's own chat template renders earlier turns differently once later ones "
                            f"follow (message {i + 1}), so the answers cannot be told from the prompts; choose one of "
                            f"{', '.join(TEMPLATES)}")
        ends = [match.end() for match in specials.finditer(after, len(before))]
        end = ends[-1] if ends else len(after)
        spans += [(done, len(before), 0), (len(before), end, 1)]
        done = end
    spans.append((done, len(whole), 0))

    parts = []
    for start, end, learn in spans:
        at = start
        for match in specials.finditer(whole, start, end):
            parts += [(whole[at : match.start()].replace(guard, ""), learn), (Special(match[0]), learn)]
            at = match.end()
        parts.append((whole[at:end].replace(guard, ""), learn))
    return [part for part in parts if part[0]]


def _run_jinja(tokenizer, messages, add_generation_prompt: bool) -> str:
    """The environment is transformers': sandboxed, and with the same whitespace rules."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError("the tokenizer brings its own chat template, which needs jinja2: pip install jinja2 (or choose "
                        f"one of {', '.join(TEMPLATES)})") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    try:
        return environment.from_string(tokenizer.jinja).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
            **tokenizer.named_specials,
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's own chat template refuses this conversation: {error}") from None
