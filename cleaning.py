"""Cleaning: what the web leaves in a text is mended, and a text that is no text is dropped.

    clean = Cleaner(without=("advertising",))
    text, dropped_by, changed_by = clean(text)      # dropped_by: "short", or None; changed_by: ("markup", "spaces")

Each rule is one small function below with its reason in its docstring, and can be switched off by its name. Two kinds:
rules that mend return the text without the fault; rules that judge return whether the document has to go.

No rule may harm a good text; where a rule cannot tell, it leaves the text alone. So the rules for prose (`code=False`)
never look into a ``` fence, and spare a text that looks like source code. Every rule takes time linear in the text.
"""

from __future__ import annotations

from settings import UserError

import difflib
import html
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

MIN_CHARS = 10  # characters that are not white space
MAX_CHARS = 10_000_000
MAX_ROUNDS = 10  # real texts settle in two or three


@dataclass(frozen=True)
class Rule:
    """One entry of the table. apply(text) -> the mended text, or, if `judges`, whether the document is dropped."""

    name: str
    apply: Callable[[str], str] | Callable[[str], bool]
    judges: bool = False
    code: bool = False  # mends source code too
    message: bool = False  # mends the messages of a conversation too
    default: bool = True
    once: bool = False  # not in the later rounds


RULES: dict[str, Rule] = {}  # in the order of application


def _rule(**properties):
    """Decorator: enter a function under its own name."""

    def enter(function):
        RULES[function.__name__] = Rule(function.__name__, function, **properties)
        return function

    return enter


# ----------------------------------------------------------------------------------------------------------------------
# Rules that mend: text -> text


@_rule(code=True, message=True, default=False, once=True)
def simplify(text: str) -> str:
    """Traditional characters become simplified ones, by OpenCC's table t2s, which knows words: 頭髮 -> 头发, 發 -> 发.

    First, so that the other rules read simplified text, and once only: a word that the table knows as traditional may read
    otherwise in its result, as 宮徵, the notes, does: 宫徵 would become 宫征. Off by default. Needs the package opencc;
    raises UserError if it is missing.
    """
    return _opencc().convert(text)


@lru_cache(maxsize=1)
def _opencc():
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError("turning traditional characters into simplified ones needs OpenCC: pip install opencc") from None
    return OpenCC("t2s")


_HAN = "\u3400-\u9fff"
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters without tab and the line ends
    "\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # soft hyphen, zero width, direction
    "\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e00ff"  # anchors, noncharacters, tags
    "\ud800-\udfff\ue000-\uf8ff\U000f0000-\U0010ffff"  # lone surrogates, private use
)
_INVISIBLE_OR_JOINER = re.compile(f"[{_INVISIBLE}\u200c\u200d]")
_JOINER_TO_DROP = re.compile("[\u200c\u200d](?![\u0600-\u0dff\u2640-\u27bf\U0001f300-\U0001faff])")
_LOST_CHARACTER = re.compile(f"[\ue000-\uf8ff](?<=[{_HAN}].)(?=[{_HAN}，。、；])")
_INVISIBLE = re.compile(f"[{_INVISIBLE}]+")


@_rule(code=True, message=True)
def control(text: str) -> str:
    """Removes what cannot be seen: control and zero-width characters, byte-order marks, private use, lone surrogates.

    They come from word processors, icon fonts and broken pages, and split words into rare tokens. \\n and \\t stay, and so
    do the joiners U+200C and U+200D before an emoji and in Persian and the scripts of India. A private-use character
    inside Chinese text stood for a character that a font of old days did not have: it becomes □, as printed books show it.
    """
    if not _INVISIBLE_OR_JOINER.search(text):
        return text
    return _INVISIBLE.sub("", _JOINER_TO_DROP.sub("", _LOST_CHARACTER.sub("□", text)))


# Tags by what takes their place. These are tags wherever they stand …
_NEW_LINE = (
    "address article blockquote body br center dd div dl dt fieldset h1 h2 h3 h4 h5 h6 hr html li ol p pre table tbody tfoot "
    "thead tr ul"
)
_NOTHING = "em font nobr o:p small span strike strong"
_TAGS = {name: place for names, place in ((_NEW_LINE, "\n"), ("td th", " "), (_NOTHING, "")) for name in names.split()}
# … and these only where they close or have attributes: a bare <title> or <b> may be a placeholder or a type.
_WORDS = (
    "a b big button code embed form head header footer i iframe img input ins link main meta nav object option param section "
    "select source title u video"
)
_WORDS = frozenset(_WORDS.split())
_PAIR = re.compile(r"<([abiu])>([^<>\n]*)</\1>", re.IGNORECASE)
_TAG = re.compile(r"(?<!`)<(/?)([a-z][a-z0-9:]*)(\s+[a-z][\w:-]*\s*=[^<>]*|\s*/?)>", re.IGNORECASE)
_HIDDEN = re.compile(
    r"<(script|style)\b[^<>]*>[^<]*(?:<(?!/?(?:script|style)\b)[^<]*)*</\1\s*>"
    r"|<!--[^-<]*(?:(?:-(?!->)|<(?!!--))[^-<]*)*-->|<!doctype[^<>]*>",
    re.IGNORECASE,
)
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|ensp|emsp|thinsp|middot|bull|hellip|mdash|ndash|[lr][sd]quo|[lr]aquo"
    r"|#[0-9]{2,6}|#x[0-9a-f]{2,5});", re.IGNORECASE
)  # fmt: skip


@_rule()
def markup(text: str) -> str:
    """Removes what is left of a web page: scripts, styles, comments, tags; &lt; and its like become characters.

    Known tags only, in the form of tags, so `a < b`, `vector<int>`, `if (a<b && c>d)` and `List<p>` stay. <sup> and <sub>
    stay: 10<sup>5</sup> is not 105. Of the entities only those with a semicolon and a name that is no usual variable:
    `&num;` may be C. A text that speaks of HTML or a <p> 标签, or that has source code in it, is not touched.
    """
    if "<" not in text and "&" not in text:
        return text
    plain = _ENTITY.sub(lambda match: html.unescape(match[0].lower()), text) if "&" in text else text
    if "<" in plain:
        plain = _PAIR.sub(r"\2", _HIDDEN.sub("", plain))
        tagless = _TAG.sub(_in_place_of_tag, plain)
        plain = re.sub(r"\n\s*\n", "\n\n", tagless) if tagless != plain else plain
    about_html = "HTML" in plain or ">标签" in text or "> 标签" in text
    return text if about_html else plain


def _in_place_of_tag(match: re.Match) -> str:
    slash, name, rest = match[1], match[2].lower(), match[3]
    if name not in _TAGS and name not in _WORDS:
        return match[0]
    before = match.string[match.start() - 1 : match.start()]
    glued = before.isascii() and before.isalnum() and name != "br"  # List<p>
    if not slash and "=" not in rest and (glued or name in _WORDS):
        return match[0]
    return _TAGS.get(name, "")


_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_INDENT = re.compile("^[ \t\xa0]*\u3000[ \t\xa0\u3000]*", re.MULTILINE)
_SPACES = re.compile("\u3000+|[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_UNUSUAL = re.compile("[\x0b-\x0d\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


@_rule(code=True, message=True)
def spaces(text: str) -> str:
    """Makes unusual white space usual: one kind of line end, one kind of space, no full-width indent, no gaps.

    A full-width space (U+3000) at the start of a line goes; inside a line one or more become one space. No-break and
    other typographic spaces become a space each: pages indent code by them. More than two empty lines become two.
    Ordinary spaces and tabs stay as they are: they are the indent of code and the columns of tables.
    """
    if _UNUSUAL.search(text):
        text = _SPACES.sub(" ", _INDENT.sub("", _LINE_END.sub("\n", text)))
    return re.sub(r"\n{4,}", "\n\n\n", text) if "\n\n\n\n" in text else text


_WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]+")
_WIDE_OR_MARK = re.compile("[０-９Ａ-Ｚａ-ｚ．％]")


@_rule()
def width(text: str) -> str:
    """Full-width letters and digits become ASCII: Ａ股 -> A股, ２０％ -> 20%, ３．５ -> 3.5.

    Otherwise the model has to learn every word and number twice. Chinese punctuation stays, as does the ． of a heading
    (１．总则). ASCII punctuation between Chinese characters stays too: 姓名,年龄 may be a sentence or a table.
    """
    if not _WIDE_OR_MARK.search(text):
        return text
    text = _WIDE.sub(lambda match: "".join(chr(ord(character) - 0xFEE0) for character in match[0]), text)
    return re.sub("(?<=[0-9])％", "%", re.sub("(?<=[0-9])．(?=[0-9])", ".", text))


# (sign, the longest run of it that stays, what a longer one becomes)
_RUNS = [("。", 2, "……"), *((sign, 1, sign) for sign in "。，、；"), *((sign, 3, sign * 3) for sign in "！？!?")]
_RUNS += [(sign, 4, sign * 2) for sign in "…—"] + [(sign, 6, sign * 6) for sign in ".·•"]
_RUNS += [(sign, 120, sign * 120) for sign in "-=_*~"]
_TWICE = re.compile("[。，、；！？!?…—.·•=_*~-](?=[。，、；！？!?…—.·•=_*~-])")
_TOO_LONG = [(sign * (most + 1), re.compile(f"{re.escape(sign)}{{{most + 1},}}"), short) for sign, most, short in _RUNS]


@_rule(message=True)
def punctuation(text: str) -> str:
    """Shortens repeated punctuation: 。。 -> 。, 。。。 -> ……, ！！！！！ -> ！！！, more than four … -> ……, dotted lines -> ......

    …… and —— stay, also doubled, and so do !! and ???, ：： as in a：b：：c：d, the rulers of Markdown and the lines of its
    tables: only a run of more than 120 of - = _ * ~ (a line of code has no more) is cut to 120.
    """
    if not _TWICE.search(text):
        return text
    for run, pattern, short in _TOO_LONG:
        if run in text:
            text = pattern.sub(short, text)
    return text


_MARKS = re.compile(
    r"(?:\[[1-9][0-9]{0,2}(?: ?[-–~] ?[1-9][0-9]{0,2})?\]|〔[1-9][0-9]?〕|\[[注註] ?[0-9]{1,3}\])+"
)
_NUMBERED = re.compile("(?:数组|列表|元素|元组|向量|矩阵|下标|索引|变量|参数|选项|步骤|文献|参考|参见|第|见|如|图|表|式|由|按|据|与|和)$")


@_rule()
def citations(text: str) -> str:
    """Removes the marks of an encyclopedia's references: 出生[1]。 his 作品[2-3][注 1]， -> 出生。 作品，

    Only after a Chinese character, or after its punctuation where a sentence ends. 数组[1], 文献[1]指出, a [1] at the start of
    a line, [1](link), the interval [1,2], [2019] and 〔2019〕12号 stay; a text with a [0] in it counts arrays.
    """
    has_marks = ("[" in text or "〔" in text) and "[0]" not in text
    return _MARKS.sub(_in_place_of_marks, text) if has_marks else text


def _in_place_of_marks(match: re.Match) -> str:
    text, start, end = match.string, match.start(), match.end()
    before, after = text[max(0, start - 2) : start], text[end : end + 1]
    if re.match(f"[{_HAN}]", before[-1:]):
        keep = _NUMBERED.search(before) or (after and after in "[(:：=号")
    else:
        keep = not before or before[-1] not in "。！？，；”》）" or (after and not after.isspace() and after not in "。，；、")
    return match[0] if keep else ""


AD_CHARS = 60  # a line with more characters is no mere notice
_AD_WORDS = re.compile(  # one of them is in every line that _AD finds; plain words that begin with rare characters are fastest
    "维码|众号|蓝字|微信|群|转载|侵权|版权所有|ICP|网安备|责编|责任编辑|上一篇|上一页|下一篇|下一页|://|读全文|看全文|展开全文|看更多|载更多|"
    "读原文|返回|收藏|设为首页"
)
_AD = re.compile(
    r"^\W*(?:欢迎|敬请|请|快来|记得)?(?:点击|长按|扫码|扫描|扫一扫|识别|搜索|微信)(?=.*(?:二维码|公众号|蓝字))(?=.*(?:关注|订阅|进群|领取)).{0,30}$"
    r"|^\W*(?:欢迎|敬请|请|快来)?关注(?:我们|本站|本号|小编)的?.{0,6}(?:公众号|微信)"
    r"|加(?:我|老师|客服|小编|群主)?的?微信[号群]?[：: ]*[A-Za-z][\w-]{4,}|微信同号|(?:QQ|qq|微信|交流|读者)群号?[：: ]*[0-9]{5,}"
    r"|转载请(?:注明|标明|联系|保留)|(?:谢绝|严禁|禁止)转载|(?:本文|本站|本网|授权).{0,20}不得转载"
    r"|如有侵权.{0,12}(?:联系|告知|通知)|版权所有(?![者人权的属归])|(?:ICP[备证]|公网安备) ?[0-9]{5,}"
    r"|^\W*(?:责任编辑|责编)[：:]|^\W*(?:本文|原文|转载|转)(?:来自|链接|地址|自)[：: ]*https?://"
    r"|^\W*[上下]一[篇页](?:\W?[：:]|(?:[ |/]*[上下]一[篇页])?\W*$)"
    r"|^\W*(?:点击)?(?:(?:阅读|查看|展开)全文|(?:查看|加载)更多|阅读原文|返回(?:列表|首页|顶部)|加入收藏|设为首页)\W*$"
)


@_rule()
def advertising(text: str) -> str:
    """Removes lines of at most 60 characters that are about the page, not the subject: 扫码关注公众号, 转载请注明, 上一篇：

    The words alone are not enough, they have to stand in such a phrase; longer lines and all other lines stay.
    """
    if not _AD_WORDS.search(text):
        return text
    return "\n".join(line for line in text.split("\n") if len(line) > AD_CHARS or not _AD.search(line.strip()))


PHONE, IDENTITY, EMAIL = "<手机号>", "<身份证号>", "<邮箱>"
_DIGITS = re.compile("[0-9][0-9 -]{9}")
_NUMBERS = re.compile(
    r"(?P<other>(?:单号|编号|流水号|序列号|条码|账号|卡号|ISBN|isbn|QQ)(?:[：: ]|是|为)*[0-9][0-9Xx -]*)"
    r"|(?<![A-Za-z0-9_./-])(?:"
    r"(?P<identity>[1-8][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx])"
    r"|(?P<phone>(?:\+?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|-[0-9]{4}-[0-9]{4}| [0-9]{4} [0-9]{4})))(?![A-Za-z0-9_]|[.-][0-9])"
)
_ADDRESS = re.compile(r"(?<![A-Za-z0-9._%+-])(?!git@)[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,10}(?![A-Za-z0-9_(:/-])")


@_rule(code=True, message=True, default=False)
def personal(text: str) -> str:
    """Masks personal data of mainland China: <手机号>, <身份证号>, <邮箱> take their place. Off by default.

    A mobile number has 11 digits and begins with 13 to 19, with or without +86 and in groups of 3-4-4; an identity number
    has 18 places, a date of birth and the check digit of GB 11643. Digits inside a longer number, a word, a path or a
    decimal stay, and so does what is called an order number, an account or an ISBN. The old identity numbers of 15 digits,
    invalid since 2013, have no check digit and stay. The placeholders are ordinary text, which every tokenizer can encode.
    """
    if _DIGITS.search(text):
        text = _NUMBERS.sub(_in_place_of_number, text)
    return _ADDRESS.sub(EMAIL, text) if "@" in text else text


def _in_place_of_number(match: re.Match) -> str:
    if match["phone"] or (match["identity"] and is_identity_number(match["identity"])):
        return PHONE if match["phone"] else IDENTITY
    return match[0]


def is_identity_number(number: str) -> bool:
    """Whether the last of 18 places is the check digit of the others (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


# ----------------------------------------------------------------------------------------------------------------------
# Rules that judge: text -> whether the document goes


@_rule(judges=True)
def short(text: str, min_chars: int = MIN_CHARS) -> bool:
    """Fewer than `min_chars` characters that are not white space: a title, a menu entry, an empty page."""
    return len(text) < min_chars or (len(text) < 100 * min_chars and len("".join(text.split())) < min_chars)


@_rule(judges=True)
def long(text: str, max_chars: int = MAX_CHARS) -> bool:
    """More than `max_chars` characters: a dump, or a file whose documents were not told apart."""
    return len(text) > max_chars


MAX_DEBRIS = 0.02
_DEBRIS_SIGN = re.compile("[锟烫屯锛銆鈥锘\ufffd\xc2-\xf4]")
_DEBRIS = re.compile(
    "(?:锟斤拷)+|烫{4,}|屯{4,}|[锛銆鈥锘鐨鏄]|\ufffd"  # UTF-8 read as GBK; memory of a debugger; what was lost
    "|[\xa1-\xff]{6,}"  # GBK or UTF-8 read as Latin-1
    "|[\xc2-\xdf][\xa1-\xbf]|[\xe0-\xef][\xa1-\xbf€‚ƒ„…†‡ˆ‰‹‘’“”•–—™]{2}"
)


@_rule(judges=True)
def mojibake(text: str) -> bool:
    """More than 2 % of the characters are what a wrong decoding leaves: 锟斤拷, 烫烫烫烫, 锛 and 銆, Ã©, â€™, U+FFFD.

    An article about such a mistake has less; so have French and German, where é and ü stand alone between letters.
    """
    return bool(_DEBRIS_SIGN.search(text)) and sum(map(len, _DEBRIS.findall(text))) > MAX_DEBRIS * len(text)


_IS_LETTER = np.array([chr(code).isalnum() for code in range(1 << 16)])
_SYMBOL = re.compile(r"[^\w\s□]|_")


@_rule(judges=True)
def symbols(text: str) -> bool:
    """Less than one letter, Chinese character or digit to two other signs: a drawing, a list of emoticons, noise.

    White space and the | and - of tables count for neither; □, a character lost in an old book, counts as a letter. Prose
    has one sign to ten letters, source code one to four; a list of short numbers or strings in code has as many signs.
    """
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    if 2 * np.count_nonzero(_IS_LETTER[units]) > len(units):
        return False  # nearly every text; what follows is exact, but seven times as slow
    marks = len(_SYMBOL.findall(text))
    letters = len("".join(text.split())) - marks
    return letters == 0 or 2 * letters < marks - text.count("|") - text.count("-")


MAX_REPETITION, MIN_REPEATED_LINES = 0.5, 10
_WORD = re.compile(r"[^\W_]")


@_rule(judges=True)
def repetition(text: str) -> bool:
    """More than half of the characters are in lines that already stood in the document, and these are at least 10 lines.

    Lines without a letter or digit, such as rulers, do not count. The measure is Gopher's (Rae et al. 2021, section A.1.1),
    but not its threshold of 20 %: songs with their refrains reach 40 %, source code with its braces 35 %.
    """
    if text.count("\n") < MIN_REPEATED_LINES:
        return False
    counts = Counter(line for line in map(str.strip, text.split("\n")) if _WORD.search(line))
    if counts.total() - len(counts) < MIN_REPEATED_LINES:
        return False
    total = sum(len(line) * count for line, count in counts.items())
    return total - sum(map(len, counts)) > MAX_REPETITION * total


# ----------------------------------------------------------------------------------------------------------------------
# All of them

_CODE = re.compile(
    r"^[ \t]*(?:def \w+\(|class \w+[:({]|import \w+|from \w[\w.]* import |#include ?[<\"]|(?:public|private|static) \w+ |function \w+\("
    r"|(?:const|var|let) \w+ ?=|return [^\n.。，]*;|(?:if|for|while) ?\([^\n。，]*\{)", re.MULTILINE
)  # fmt: skip


class Cleaner:
    """The rules in their order, without those that are named. Cleaning a text again changes nothing (but `simplify` may)."""

    def __init__(self, without: tuple[str, ...] = (), *, min_chars: int = MIN_CHARS, max_chars: int = MAX_CHARS,
                 mask_pii: bool = False, simplify: bool = False):  # fmt: skip
        """Raises UserError for a name that is no rule, and for `simplify` where OpenCC is missing."""
        for name in without:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, n=1, cutoff=0)
                raise UserError(f"there is no cleaning rule {name!r}; did you mean {near[0]}? There are {', '.join(RULES)}")
        asked = {"personal": mask_pii, "simplify": simplify}
        rules = [rule for rule in RULES.values() if asked.get(rule.name, rule.default) and rule.name not in without]
        limits = {"short": {"min_chars": min_chars}, "long": {"max_chars": max_chars}}
        self._mending = [rule for rule in rules if not rule.judges]
        self._judging = [(rule.name, partial(rule.apply, **limits.get(rule.name, {}))) for rule in rules if rule.judges]
        self._in_messages = [rule for rule in self._mending if rule.message]
        if any(rule.name == "simplify" for rule in rules):
            _opencc()

    def __call__(self, text: str) -> tuple[str, str | None, tuple[str, ...]]:
        """-> (the mended text without white space at its ends, the rule that drops it or None, the rules that mended it)

        A text that does not settle in MAX_ROUNDS, such as tags nested in tags, is dropped by the rule that mended it last.
        """
        text, changed_by, restless = _mended(text, self._mending)
        dropped_by = restless or next((name for name, judges in self._judging if judges(text)), None)
        return text, dropped_by, changed_by

    def mend(self, text: str) -> tuple[str, tuple[str, ...]]:
        """-> (text, changed_by) for a message of a conversation, by the rules marked `message`; it is never dropped.

        These are control, spaces, punctuation and, where asked for, simplify and personal. People ask about HTML, about
        full-width digits, about [1] and about advertisements, so the other rules would spoil their questions.
        """
        return _mended(text, self._in_messages)[:2]


def _mended(text: str, rules: list[Rule]) -> tuple[str, tuple[str, ...], str | None]:
    """Apply the rules round after round until nothing changes. -> (text, rules that changed it, the one that did not settle)

    One rule may make work for one before it: an entity becomes a no-break space, a lost tag leaves an empty line.
    """
    text, changed_by, settled, restless = text.strip(), set(), 0, None
    for turn, rule in enumerate(itertools.islice(itertools.cycle(rules), MAX_ROUNDS * len(rules))):
        if rule.once and turn >= len(rules):
            mended = text
        else:
            mended = rule.apply(text) if rule.code else _mend_prose(rule, text)
        settled += 1  # so many rules in a row have nothing to do
        if mended != text:
            text, settled, restless = mended.strip(), 0, rule.name
            changed_by.add(rule.name)
        if settled == len(rules):
            restless = None
            break
    return text, tuple(rule.name for rule in rules if rule.name in changed_by), restless


def _mend_prose(rule: Rule, text: str) -> str:
    """Apply a rule to what is outside ``` fences, unless the text is source code."""
    if "```" in text:
        parts = text.split("```")
        parts[::2] = map(rule.apply, parts[::2])
        mended = "```".join(parts)
    else:
        mended = rule.apply(text)
    return text if mended != text and _CODE.search(mended) else mended
