"""Cleaning: what the web leaves in a text is mended, and a text that is no text is dropped.

    clean = Cleaner(without=("advertising",))
    text, dropped_by, changed_by = clean(text)      # dropped_by: "short", or None; changed_by: ("markup", "spaces")

Each rule is one small function below with its reason in its docstring, and can be switched off by its name. Two kinds:
rules that mend return the text without the fault; rules that judge return whether the document has to go.

No rule may harm a good text; where a rule cannot tell, it leaves the text alone. Most rules are for prose (`code=False`):
they see no code, fenced, `inline` or indented by four spaces, and spare a source file. Each takes time linear in the text.
"""

from __future__ import annotations

from settings import UserError

import difflib
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

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
    unless: re.Pattern | None = None  # found anywhere in the text, code included: the rule leaves the text alone


RULES: dict[str, Rule] = {}  # in the order of application


def _rule(**properties):
    """Decorator: enter a function under its own name."""

    def enter(function):
        RULES[function.__name__] = Rule(function.__name__, function, **properties)
        return function

    return enter


# ----------------------------------------------------------------------------------------------------------------------
# Rules that mend: text -> text


@_rule(code=True, message=True)
def simplify(text: str) -> str:
    """Traditional characters become simplified ones, by OpenCC's table t2s, which knows words: 頭髮 -> 头发, 發 -> 发.

    First, for the other rules read its result, and once only: 宮徵, the notes, becomes 宫徵, and that would become 宫征.
    Off by default. Needs the package opencc; raises UserError if it is missing.
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
_UNSEEN = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters without tab and the line ends
    "\xad\u034f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # soft hyphen, zero width, joiners, direction
    "\ud800-\udfff\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e00ff"  # surrogates, noncharacters, tags
)
_EMOJI = "[\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]"
_THAI = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # with Lao, Burmese and Khmer: written without spaces
_MEANINGFUL = re.compile(  # with the character before and the one after
    f"{_EMOJI}\u200d{_EMOJI}|{_THAI}\u200b{_THAI}|[\u0600-\u0dff\u1000-\u109f\u1780-\u18af][\u200c\u200d].?"
    "|\U0001f3f4[\U000e0020-\U000e007f]+.?", re.DOTALL
)  # fmt: skip
_PRIVATE_USE = "\ue000-\uf8ff\U000f0000-\U0010ffff"
_RUN = re.compile(f"[{_UNSEEN}{_PRIVATE_USE}][{_UNSEEN}{_PRIVATE_USE}]*")  # twice as fast as with one [] and a +
_CHINESE = re.compile(f"[{_HAN}，。、；：！？…—“”‘’（）《》「」『』【】]")


@_rule(code=True, message=True)
def control(text: str) -> str:
    """Removes what cannot be seen: control and zero-width characters, byte-order marks, private use, lone surrogates.

    What has a meaning stays: joiners between emoji, in Arabic and in the scripts of India, U+200B between the words of Thai
    and its like, the flag of England. A private-use character beside a Chinese one stood for a character that a font of old
    days did not have: it becomes □, as printed books show it.
    """
    return _RUN.sub(_in_place_of_unseen, text)


def _in_place_of_unseen(run: re.Match) -> str:
    around = run.string[max(0, run.start() - 1) : run.end() + 1]
    if _MEANINGFUL.fullmatch(around):
        return run[0]
    return "□" * len(re.findall(f"[{_PRIVATE_USE}]", run[0])) if _CHINESE.search(around) else ""


_NEW_LINE = (
    "address article blockquote body br center dd div dl dt fieldset footer form h1 h2 h3 h4 h5 h6 head header hr html li main "
    "nav ol p pre section select table tbody tfoot thead title tr ul"
)
_NOTHING = "a b big button em font i iframe img input ins link meta nobr o:p object option param small span strike strong u video"
_TAGS = {name: place for names, place in ((_NEW_LINE, "\n"), ("td th", " "), (_NOTHING, "")) for name in names.split()}
_UNPAIRED = {"br", "dd", "dt", "hr", "li", "p", "td", "th", "tr"}  # pages leave out the ends of these
_TAG = re.compile(r"<(/?)([a-z][a-z0-9:]*)(\s+[a-z][\w:-]*\s*=[^<>]*|\s*/?)>", re.IGNORECASE)
_HIDDEN = re.compile(
    r"<(script|style)\b[^<>]*>[^<]*(?:<(?!/?(?:script|style)\b)[^<]*)*</\1\s*>"
    r"|<!--[^-<]*(?:(?:-(?!->)|<(?!!--))[^-<]*)*-->|<!doctype[^<>]*>", re.IGNORECASE
)  # fmt: skip
_NAMES = "amp|lt|gt|quot|apos|nbsp|ensp|emsp|thinsp|middot|bull|hellip|mdash|ndash|[lr][sd]quo|[lr]aquo"
_ENTITY = re.compile(f"&(?:{_NAMES}|#[0-9]{{2,6}}|#x[0-9a-f]{{2,5}});", re.IGNORECASE)
_ABOUT_HTML = re.compile(  # the word, but not in <html>, text/html, index.html; or a bare tag as the subject of a sentence
    r"html(?<![a-z<./\"'_-]html)(?<!dtd html)(?![a-z>\"'])"
    r"|[<;]/?[a-z][a-z0-9]* ?/?(?:>|&gt;)[”\"」』]? ?(?:标签|元素|标记|属性|表示)", re.IGNORECASE
)  # fmt: skip


@_rule(unless=_ABOUT_HTML)
def markup(text: str) -> str:
    """Removes what is left of a web page: scripts, styles, comments, tags; &lt; and its like become characters.

    Tags go only from a text with a known tag that closes or has an attribute, or with a <br> after a sentence, and only
    those that have an end there or need none: `vector<int>`, `SELECT * FROM <table>`, 按 <b> 键 stay. <sup> and <sub> stay
    everywhere: 10<sup>5</sup> is not 105. Entities need a semicolon, and `&num;`, which may be C, is none of them.
    A text that speaks of HTML, or of a <p> 标签, is not touched.
    """
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0].lower()), text)
    if "<" not in text:
        return text
    text = _HIDDEN.sub("", text)
    ended = {name.lower() for slash, name, rest in _TAG.findall(text) if slash or "=" in rest} & _TAGS.keys()
    if not ended and not re.search("[。！？]<br", text, re.IGNORECASE):
        return text
    places = {name: _TAGS[name] for name in ended | _UNPAIRED}
    return re.sub(r"\n\s*\n", "\n\n", _TAG.sub(lambda tag: places.get(tag[2].lower(), tag[0]), text))


_LINE_END = re.compile("[\x0b-\x0d\x85\u2028\u2029]")


@_rule(code=True, message=True)
def spaces(text: str) -> str:
    """One kind of line end; no-break spaces become spaces, for pages indent code by them; at most two empty lines follow.

    Ordinary spaces and tabs stay as they are: they are the indent of code and the columns of tables.
    """
    text = _LINE_END.sub("\n", text.replace("\r\n", "\n")).replace("\xa0", " ")
    return re.sub(r"\n{4,}", "\n\n\n", text) if "\n\n\n\n" in text else text


_WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]+")
_WIDE_OR_SPACE = re.compile("[０-９Ａ-Ｚａ-ｚ．％\u1680\u2000-\u200a\u202f\u205f\u3000]")
_INDENT = re.compile("^[ \t]*\u3000[ \t\u3000]*", re.MULTILINE)
_SPACES = re.compile("\u3000(?<![\"'\u3000]\u3000)\u3000*")


@_rule()
def width(text: str) -> str:
    """Full-width letters, digits and spaces become ASCII: Ａ股 -> A股, ２０％ -> 20%, ３．５ -> 3.5.

    Otherwise the model has to learn everything twice. Punctuation stays, as does the ． of a heading (１．总则). A full-width
    indent goes; inside a line some full-width spaces become one space, but "\u3000" in quotes is spoken of.
    """
    if not _WIDE_OR_SPACE.search(text):
        return text
    text = _WIDE.sub(lambda match: "".join(chr(ord(character) - 0xFEE0) for character in match[0]), text)
    text = re.sub("％(?<=[0-9]％)", "%", re.sub("．(?<=[0-9]．)(?=[0-9])", ".", text))
    return _SPACES.sub(" ", _INDENT.sub("", re.sub("[\u1680\u2000-\u200a\u202f\u205f]", " ", text)))


_RUNS = [  # a run with one sign more than the key is cut to it
    (sign * most, re.compile(f"{re.escape(sign)}{{{most},}}"))
    for signs, most in (("！？!?", 3), ("…—", 4), (".·•", 6), ("-=_*~", 120)) for sign in signs
]  # fmt: skip
_STOPS = re.compile("(?<=[\\w□”）》])。(。+)")


@_rule(message=True)
def punctuation(text: str) -> str:
    """Shortens repeated punctuation: 。。 -> 。, 。。。 -> ……, ！！！！！ -> ！！！, a dotted line -> ......

    !! and ???, …… and ——, also doubled, stay, and so do the empty columns of ，，， and a 。。 that follows no word. Of rulers
    and tables only a run of more than 120 - = _ * ~ (a line of code has no more) is cut.
    """
    if "。。" in text:
        text = _STOPS.sub(lambda stops: "……" if len(stops[1]) > 1 else "。", text)
    for longest, run in _RUNS:
        if longest in text:
            text = run.sub(longest, text)
    return text


_MARK = r"(?:\[[1-9][0-9]{0,2}(?: ?[-–~] ?[1-9][0-9]{0,2})?\]|〔[1-9][0-9]?〕|\[[注註] ?[0-9]{1,3}\])"
_MARKS = re.compile(f"{_MARK}+")
_CITATION = re.compile(
    f"(?=[ [〔])(?:(?<=[{_HAN}”》）])(?<![见如据按是为和与在到入出])(?<!数组|列表|元素|矩阵|变量|选项|文献) ?{_MARK}+ ?(?=[，。；！？])"
    f"|(?<=[。！？”》]){_MARK}+(?=[\\s，。；]|\\Z))"
)


@_rule(unless=re.compile(r"\[0\]"))
def citations(text: str) -> str:
    """Removes the marks of an encyclopedia's references: 出生[1]。 his 作品[2-3][注 1]， -> 出生。 作品，

    Only where a clause ends, and only if most marks of the text stand so: 骰子[3]点, 输出[1], 把[1]放入[2]。, 数组[1]，, a [1]
    at the start of a line, [1](link), the interval [1,2], [2019] and 〔2019〕12号 stay; a text with a [0] counts arrays.
    """
    if "[" not in text and "〔" not in text:
        return text
    mended, removed = _CITATION.subn("", text)
    return mended if 2 * removed > len(_MARKS.findall(text)) else text


AD_CHARS = 60  # a line with more characters is no mere notice
_AD = re.compile(
    r"\W*(?:"
    r"(?:欢迎|敬请|请|快来|记得)?(?:点击|长按|扫码|扫描|扫一扫|识别)(?=.*(?:二维码|公众号|蓝字))[^，。？]*(?:关注|订阅|进群|领取)[^。？]*"
    r"|转载请(?:注明|标明|保留|联系)(?:本文|原文)?(?:出处|来源|作者|链接|我们|本站)*(?:[：:].*|。)?|(?:谢绝|严禁|禁止)转载"
    r"|(?:著作权归作者所有。)?商业转载请联系作者获得授权，非商业转载请注明出处。"
    r"|版权所有(?:[，, ]*(?:侵权|翻印|违者)必究|(?: ?(?:©|\([Cc]\)|[：:]))[^。？]*)?|\w?(?:ICP[备证]|公网安备) ?[0-9]{5,}号?[-0-9]*"
    r"|(?:责任编辑|责编)[：:][^。？]*|[上下]一[篇页](?:[：:][^。？]*|[ |/]*[上下]一[篇页])?"
    r"|(?:点击)?(?:(?:阅读|查看|展开)全文|(?:查看|加载)更多|阅读原文|返回(?:列表|首页|顶部)|加入收藏|设为首页)"
    r")[^\w。？?]*"
)


@_rule()
def advertising(text: str) -> str:
    """Removes lines of at most 60 characters that are about the page, not the subject: 扫码关注公众号, 转载请注明, 上一篇：

    The whole line has to be such a notice: a sentence that speaks of reprints or of following somebody stays.
    """
    lines = text.split("\n")
    kept = [line for line in lines if len(line) > AD_CHARS or not _AD.fullmatch(line)]
    return text if len(kept) == len(lines) else "\n".join(kept)


PHONE, IDENTITY, EMAIL = "<手机号>", "<身份证号>", "<邮箱>"
_NARROW = str.maketrans("０１２３４５６７８９Ｘｘ－＋", "0123456789Xx-+")
_DIGITS = re.compile("[0-9０-９][0-9０-９ －-]{9}")
_NUMBERS = re.compile(
    r"(?:单号|编号|流水号|序列号|条码|账号|卡号|时间戳|ISBN|isbn|QQ)(?:[：: ]|是|为)*[0-9][0-9Xx -]*"
    r"|(?<![A-Za-z0-9_./¥￥$-])(?:"
    r"(?P<identity>[1-8][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx])"
    r"|(?P<phone>(?:\+?86[ -]?)?1(?:[348][0-9]|5[0-35-9]|6[2567]|7[0-8]|9[0-35-9])(?:[0-9]{8}|-[0-9]{4}-[0-9]{4}| [0-9]{4} [0-9]{4}))"
    r")(?![A-Za-z0-9_]|[.-][0-9]| ?[元块万亿美吨个次股米])"
)
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9._%+-])(?!git@)[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]+\.)+(?!(?:js|ts|py|gz|md|sh|go|rs)\b)"
    r"(?:com|net|org|edu|gov|info|top|xyz|vip|[a-z]{2})(?![A-Za-z0-9_(:/-]|\.[a-z])"
)


@_rule(code=True, message=True)
def personal(text: str) -> str:
    """Masks personal data of mainland China: <手机号>, <身份证号>, <邮箱> take their place. Off by default.

    A mobile number has 11 digits and one of today's prefixes, with or without +86 and in groups of 3-4-4; an identity number
    has 18 places, a date of birth and the check digit of GB 11643; their digits may be full-width. Digits inside a longer
    number, a word, a path or a decimal stay, and so do sums of money and what is called an order number, an account or an
    ISBN. An address ends in a common domain, not .tar.
    """
    if _DIGITS.search(text):
        parts, end = [], 0
        for match in _NUMBERS.finditer(text.translate(_NARROW)):  # as long as text
            if match["phone"] or (match["identity"] and is_identity_number(match["identity"])):
                parts += text[end : match.start()], PHONE if match["phone"] else IDENTITY
                end = match.end()
        text = "".join(parts) + text[end:]
    return _ADDRESS.sub(EMAIL, text) if "@" in text else text


def is_identity_number(number: str) -> bool:
    """Whether the last of 18 places is the check digit of the others (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


# ----------------------------------------------------------------------------------------------------------------------
# Rules that judge: text -> whether the document goes


@_rule(judges=True)
def short(text: str, min_chars: int = MIN_CHARS) -> bool:
    """Fewer than `min_chars` characters that are not white space: a title, a menu entry, an empty page."""
    return not re.match(rf"(?:\s*\S){{{min_chars}}}", text)


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

    That is UTF-8 read as GBK, UTF-8 or GBK read as Latin-1, and whatever a decoder replaced; what it dropped without a trace
    cannot be seen. An article about such a mistake has less; so have French and German, where é and ü stand alone.
    """
    return bool(_DEBRIS_SIGN.search(text)) and sum(map(len, _DEBRIS.findall(text))) > MAX_DEBRIS * len(text)


_LETTERS = bytes(byte for byte in range(128) if chr(byte).isalnum()) + bytes(range(0xE5, 0xEA))  # UTF-8 of U+5000 to U+9FFF
_SYMBOL = re.compile(r"[^\w\s□]|_")


@_rule(judges=True)
def symbols(text: str) -> bool:
    """Less than one letter, Chinese character or digit to two other signs: a drawing, a list of emoticons, noise.

    White space and the | and - of tables count for neither; □, a character lost in an old book, counts as a letter. Prose
    has one sign to ten letters, source code one to four; a list of short numbers or strings in code has as many signs.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    if 2 * (len(encoded) - len(encoded.translate(None, _LETTERS))) > len(text):
        return False  # nearly every text, four times as fast as the exact count
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
    lines = [line for line in map(str.strip, text.split("\n")) if _WORD.search(line)]
    different = set(lines)
    if len(lines) - len(different) < MIN_REPEATED_LINES:
        return False
    total = sum(map(len, lines))
    return total - sum(map(len, different)) > MAX_REPETITION * total


# ----------------------------------------------------------------------------------------------------------------------
# All of them

_CODE = re.compile(
    r"^[ \t]*(?:def \w+\(|class \w+[:({]|import \w+|from \w[\w.]* import |#include ?[<\"]|(?:public|private|static) \w+ |function \w+\("
    r"|(?:const|var|let) \w+ ?=|return [^\n.。，]*;|(?:if|for|while) ?\([^\n。，]*\{)", re.MULTILINE
)  # fmt: skip
_HOLE = re.compile("[\U000f0000-\U000fffff]")
_CODE_PIECE = re.compile(
    r"```.*?(?:```|\Z)|^~~~.*?(?:^~~~|\Z)|`[^`\n]+`|(?<=\n\n)(?:(?: {4}|\t)[ \t]*[!-~][^\n]*\n?)+", re.DOTALL | re.MULTILINE
)
_CODE_SIGNS = ("`", "~~~", "\n\n    ", "\n\n\t")


class Cleaner:
    """The active rules, by name in `names`, in their order. Cleaning again changes nothing (but `simplify` may, see there)."""

    def __init__(self, without: tuple[str, ...] = (), *, min_chars: int = MIN_CHARS, max_chars: int = MAX_CHARS,
                 mask_pii: bool = False, simplify: bool = False):  # fmt: skip
        """min_chars counts the characters that are not white space, max_chars all. Raises UserError for a name that is no
        rule, and for `simplify` where OpenCC is missing."""
        for name in without:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, n=1, cutoff=0)
                raise UserError(f"there is no cleaning rule {name!r}; did you mean {near[0]}? There are {', '.join(RULES)}")
        asked = {"personal": mask_pii, "simplify": simplify}
        rules = [rule for rule in RULES.values() if asked.get(rule.name, True) and rule.name not in without]
        limits = {"short": {"min_chars": min_chars}, "long": {"max_chars": max_chars}}
        self.names = tuple(rule.name for rule in rules)
        self._mending = [rule for rule in rules if not rule.judges and rule.name != "simplify"]
        self._judging = [(rule.name, partial(rule.apply, **limits.get(rule.name, {}))) for rule in rules if rule.judges]
        self._in_messages = [rule for rule in self._mending if rule.message]
        if "simplify" in self.names:
            _opencc()

    def __call__(self, text: str) -> tuple[str, str | None, tuple[str, ...]]:
        """-> (the mended text without white space at its ends, the rule that drops it or None, the rules that mended it)"""
        text, changed_by = self._mended(text, self._mending)
        return text, next((name for name, judges in self._judging if judges(text)), None), changed_by

    def mend(self, text: str) -> tuple[str, tuple[str, ...]]:
        """-> (text, changed_by) for a message of a conversation, by the rules marked `message`; it is never dropped.

        These are control, spaces, punctuation and, where asked for, simplify and personal. People ask about HTML, about
        full-width digits, about [1] and about advertisements, so the other rules would spoil their questions.
        """
        return self._mended(text, self._in_messages)

    def _mended(self, text: str, rules: list[Rule]) -> tuple[str, tuple[str, ...]]:
        """Apply the rules round after round until nothing changes, MAX_ROUNDS at most. -> (text, rules that changed it)

        One rule may make work for one before it: an entity becomes a no-break space, a lost tag leaves an empty line.
        """
        text, changed_by = text.strip(), set()
        if "simplify" in self.names and (simplified := simplify(text).strip()) != text:
            text = simplified
            changed_by.add("simplify")
        for _ in range(MAX_ROUNDS):
            before = text
            for rule in rules:
                mended = rule.apply(text) if rule.code else _mend_prose(rule, text)
                if mended != text:
                    text = mended.strip()
                    changed_by.add(rule.name)
            if text == before:
                break
        return text, tuple(name for name in self.names if name in changed_by)


def _mend_prose(rule: Rule, text: str) -> str:
    """Apply a rule to the text without its code, in whose place single characters of private use stand meanwhile."""
    mended = rule.apply(text)
    if mended == text or (rule.unless and rule.unless.search(text)):
        return text
    code = _CODE_PIECE.findall(text) if any(sign in text for sign in _CODE_SIGNS) else []
    if code:
        if len(code) > 0xFFFF or _HOLE.search(text):
            return text
        holes = map(chr, range(0xF0000, 0xFFFFF))
        mended = rule.apply(_CODE_PIECE.sub(lambda _: next(holes), text))
    if _CODE.search(mended):
        return text
    return _HOLE.sub(lambda hole: code[ord(hole[0]) - 0xF0000], mended) if code else mended
