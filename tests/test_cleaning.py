"""cleaning.py: what each rule does to the letter, what it leaves alone, and that a cleaned text is clean."""

from __future__ import annotations

from settings import UserError

import os
import re
import sys
import time
import types
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cleaning
from cleaning import RULES, Cleaner, is_identity_number
from readers import PRETRAINING, Corpus

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CRIA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
clean = Cleaner(min_chars=1, mask_pii=True)


def mended_by(name: str, text: str) -> str:
    """`text` after this rule alone, as the Cleaner applies it."""
    rule = RULES[name]
    return rule.apply(text) if rule.code else cleaning._mend_prose(rule, text)


# ----------------------------------------------------------------------------------------------------------------------
# Rules that mend

MENDED = {
    "control": [
        ("\ufeff春\u200b眠\x00不\u202e觉\xad晓\x7f", "春眠不觉晓"),
        ("一\ud83d二\U000f0000三\ufffe", "一二□三"),
        ("贾\ue4c0扁，韝鞠\ue031，\ue345 首页 \ue345", "贾□扁，韝鞠□，□ 首页 "),
        ("\ue345 Home \ue345", " Home "),
        ("\ue000之，\ue001 和\ue002\ue003。\n\ue004\ue005人", "□之，□ 和□□。\n□□人"),
        ("中\u200d文 a\u200db 中\u200d😀 中\u200b文", "中文 ab 中😀 中文"),
        ("\U000e0067\U000e0062", ""),
    ],
    "markup": [
        ("<p>一</p><p>二</p>", "\n一\n\n二\n"),
        ("一。<br/>二<BR>三", "一。\n二\n三"),
        ("<DIV class='x'>甲</DIV>", "\n甲\n"),
        ("<table><tr><td>甲</td><td>乙</td></tr></table>", "\n\n 甲  乙 \n\n"),
        ('点<a href="http://x.cn/?a=1&b=2">这里</a>，<b>快</b>', "点这里，快"),
        ("前<script>if (a<b) {x='<p>'}</script>后", "前后"),
        ("前<style type='text/css'>p {color: red}</style>后<!-- <p>旧</p> -- 注 -->。", "前后。"),
        ("&lt;p&gt;一&lt;/p&gt;", "\n一\n"),
        ("比值&lt;1，马克&middot;吐温&#12290;&#x3002;&quot;好&quot;", "比值<1，马克·吐温。。\"好\""),
        ("&amp;amp;", "&amp;"),
        ("<!DOCTYPE html>\n<html>\n<body>一</body></html>", "\n\n一\n\n"),
        ("<title>我的主页</title>\n<section>第一节</section><button>提交</button>", "\n我的主页\n\n第一节\n提交"),
        ("<p>一<p>二<table><tr><td>三</table>", "\n一\n二\n\n 三\n"),
        ("<p>一</p>用 `<p>` 分段", "\n一\n用 `<p>` 分段"),
        ("<p>一</p>\n~~~\n<p>二</p>\n~~~\n```\n<p>三</p>\n```", "\n一\n\n~~~\n<p>二</p>\n~~~\n```\n<p>三</p>\n```"),
        ("<b>一</b>：\n\n    <b>二</b>\n\t<b>三</b>\n四<b>五</b>", "一：\n\n    <b>二</b>\n\t<b>三</b>\n四五"),
        ("前<!-- 注 -->后", "前后"),
    ],
    "spaces": [
        ("一\xa0二", "一 二"),
        ("\xa0\xa0if x:\n\xa0\xa0\xa0\xa0y", "  if x:\n    y"),
        ("一\r\n二\r三\u2028四\x0c五\x85六", "一\n二\n三\n四\n五\n六"),
        ("一\n\n\n\n\n\n二", "一\n\n\n二"),
    ],
    "width": [
        ("Ａ股２０２４年ｇｐｔ", "A股2024年gpt"),
        ("３．５倍，２０％，50％", "3.5倍，20%，50%"),
        ("１．总则", "1．总则"),
        ("一\u2003二\u2009三", "一 二 三"),
        ("\u3000\u3000第一段\n \u3000第二段\u3000\u3000句", "第一段\n第二段 句"),
    ],
    "punctuation": [
        ("好。。", "好。"),
        ("他走了。。。。", "他走了……"),
        ("他说：“走了。。”（走了。。。）", "他说：“走了。”（走了……）"),
        ("一。。`。。`", "一。`。。`"),
        ("好！！！！！！吗？？？？!!!!!????", "好！！！吗？？？!!!???"),
        ("啊…………………", "啊…………"),
        ("破—————折", "破————折"),
        ("目录..............1 二·········2", "目录......1 二······2"),
        ("-" * 200, "-" * 120),
    ],
    "citations": [
        ("他于1990年出生[1]。", "他于1990年出生。"),
        ("代表作[2-3][注 1]，获奖[10]。[4]", "代表作，获奖。"),
        ("成立。[1] 此后", "成立。 此后"),
        ("古文〔3〕，", "古文，"),
        ("演员 [1] 。他在[2]处。又演过戏[3]，得了奖[4]；", "演员。他在[2]处。又演过戏，得了奖；"),
    ],
    "advertising": [
        ("正文一。\n扫码关注我们的公众号\n正文二。", "正文一。\n正文二。"),
        ("正文。\n上一篇：春天\n下一篇：夏天", "正文。"),
        ("正文。\n上一页 下一页\n（责任编辑：张三）\n转载请注明出处", "正文。"),
        ("正文。\n版权所有 © 2020 某某公司\n京ICP备12345678号-1", "正文。"),
        ("正文。\n【查看更多】\n点击上方蓝字关注我们\n版权所有，侵权必究\n转载请注明出处：https://example.com", "正文。"),
        ("著作权归作者所有。商业转载请联系作者获得授权，非商业转载请注明出处。\n正文。", "正文。"),
    ],
    "personal": [
        ("电话13812345678，", "电话<手机号>，"),
        ("+86 138-1234-5678 或 138 1234 5678.", "<手机号> 或 <手机号>."),
        ("身份证11010519491231002X。", "身份证<身份证号>。"),
        ("写信到zhang.san+a@mail.example.com。", "写信到<邮箱>。"),
        ("电话１３８１２３４５６７８，Ａ１座", "电话<手机号>，Ａ１座"),
    ],
}  # fmt: skip

UNTOUCHED = {
    "control": [
        "一\n\t二", "👨\u200d👩\u200d👧 ❤️", "می\u200cخواهم", "é e\u0301 𠮷 □", "ক\u09cd\u200dষ ක\u0dca\u200dෂ",
        "สวัสดี\u200bชาวโลก", "ភាសា\u200bខ្មែរ", "မြန်မာ\u200bဘာသာ", "❤\ufe0f\u200d🔥 🏴\u200d☠",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ],
    "markup": [
        "a < b 且 c > d", "vector<int> v; map<string, List<p>> m;", "if (a<b && c>d) x();", "x <- y; y -> z; a<=b",
        "List<a>", "10<sup>5</sup>，H<sub>2</sub>O", "P&G、AT&T、R&D", "?a=1&copy=2&lt=3", "int *p = &num; q = &it;",
        "CSS 布局：<div> 是块级元素，<span> 是行内元素，<ul> 与 <ol> 是列表。",
        "用<table>元素排版已经过时，应改用<div>元素",
        "SELECT * FROM <table> WHERE id=1", "x <p> y", "换行写作<br>或<br/>",
        "例子 Html：\n```html\n<div>你好</div>\n```\n其中 <div>好</div>，<br> 表示换行", "先写<p>一</p>，</p> 表示段落结束",
        "用 &lt;b&gt; 标签：&lt;b&gt;粗&lt;/b&gt;", "例：\n\n    <p>甲</p>\n\n完", "~~~\n<p>一</p>\n~~~",
        "HTML 里 <p> 表示段落，&lt; 表示小于号。", "<p> 标签和 </p> 标签", "用 `<p>` 和 `<br>` 分段", "```html\n<p>一</p>\n```",
        "cd <title>，按 <b> 键，<s> 与 </s>，<手机号>", "邮件 <a@b.cn>", "<https://example.com>",
        '文字 print("<p>x</p>")\nimport os',
        "a &= b; &amp", "\\begin{cases} x & y \\\\ z < 1 \\end{cases}",
    ],
    "spaces": ["def f():\n    return 1\n\n\ndef g():\n\tpass", "| a  | b |", "一  二 "],
    "width": ["你好，世界！（一）：“二”", "姓名,年龄", "．总则", "50%", "```\nＡ\n```",
              "```\ns.replace('\u3000', ' ')\n```", 'if c == "\u3000\u3000":', "`Ａ\u3000`"],
    "punctuation": [
        "他说……好……吧——不", "…………", "————", "wait... no!!! ???", "std::vector 甲：乙：：丙：丁",
        "---\n***\n===",
        "|------|:----:|", "# " + "-" * 118, "a = [[], {}]", "1......6", "？！？！", "```\n。。\n```",
        "王成一見賊，，，據薛經報導", "| ，， | 。。 |", '`x = "。。。"`', "一、、二；；；",
    ],
    "citations": [
        "数组[1]和列表[2]", "a[1]", "第[1]步", "文献[1]指出", "区间[1,2]上", "见[3]", "\n[1] 张三.",
        "请在[1]处填入适当的词，在[2]处填入数字。小明把[3]交给老师。", "骰子[3]点", "输出[1]", "把[1]放入[2]", "把[1]放入[2]。",
        "元素包括[1]、[2]", "元素包括[1]、[2]。", "[1]2]", "见[3]。", "数组[1]，", "出生[1]。\n```\na[0]\n```\n后来[2]。",
        "链接[1](http://x)", "国发〔2019〕12号",
        "下标[0]到末尾[9]", "方法：[1]洗；[2]切。[3]炒", "[1]", "于[2019]年", "矩阵[1][2]", "脚注[^1]", "[注意]", "[100000]",
    ],
    "advertising": [
        "搜索公众号并且关注，" + "然后就会有很长的一句话，" * 5,
        "我们在微信上聊天。", "下一章我们讨论版权。", "这本书的版权所有者是张三。", "未经著作权人许可，不得复制其作品。",
        "编辑：李四", "来源：新华社",
        "被告人张某让被害人添加微信号 abc12345 后实施诈骗。", "骗子让她加微信wxid_123转账",
        "法院认定，网站禁止转载的声明有效。", "著作权法规定，未经授权的作品不得转载。", "问：版权所有，侵权必究是什么意思？",
        "版权所有，侵权必究是什么意思？", "版权所有：法律怎样规定？", "转载请注明出处是一种礼貌。", "禁止转载的声明有效。", "阅读全文。",
        "答：转载请注明出处", "上一篇：我们说到春天。", "扫码关注公众号的人多了，骗子也多了。", "扫描二维码，关注公众号后可以查分",
        "上一篇文章说到春天。", "微信公众号是什么", "他返回首页看了看", "关注民生。",
        "我关注了一个公众号。", "请扫描二维码支付。", "点击公众号的菜单",
        "原文见 https://example.com", "群众反对", "“你扫码关注了他的公众号吗？”小王问。",
    ],
    "personal": [
        "订单号：13812345678", "编号138123456789012345", "ISBN 9787111128069", "圆周率3.13812345678", "2138123456780",
        "20240101123456789", "110105194912310021", "2024-01-01 12:00", "git@github.com:a/b.git", "a@b",
        "A@B.transpose()",
        "/13812345678.html", "12812345678", "x13812345678", "pkg@1.0.0",
        "13812345678元", "￥13812345678", "时间戳：16123456789", "16123456789", "15412345678", "pkg@latest.tar", "a@b.min.js",
        "１２８１２３４５６７８", "１３８１２３４５６７８９",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), [(name, *pair) for name, pairs in MENDED.items() for pair in pairs])
def test_a_rule_mends(name, text, expected):
    assert mended_by(name, text) == expected


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in UNTOUCHED.items() for text in texts])
def test_a_rule_leaves_alone(name, text):
    assert mended_by(name, text) == text


def test_every_rule_has_examples_and_a_reason():
    mending = {name for name, rule in RULES.items() if not rule.judges}
    assert mending - {"simplify"} == set(MENDED) == set(UNTOUCHED)
    assert all(len(rule.apply.__doc__) > 60 for rule in RULES.values())


# ----------------------------------------------------------------------------------------------------------------------
# Rules that judge


@pytest.mark.parametrize(
    ("text", "dropped_by"),
    [
        ("一二三四五六七八九", "short"),
        ("一 二 三 四 五 六 七 八 九 \n", "short"),
        ("一" + " " * 2000 + "二", "short"),
        ("一二三四五六七八九十", None),
        ("★☆★☆ ♪♪♪ (^_^) (>_<) 好的 ～～～", "symbols"),
        ("| 1.5 | -2.3 |\n|-----|------|\n| 0.1 | 10.9 |", None),
        ("□□□□□，□□□□□。\n□□□□□，三月閨情。", None),
        ("points = [(1, 2), (3, 4)]; names = {'a': 1}", None),
        ("".join(f"首页推荐阅读第一期\n第{i}行\n" for i in range(12)), "repetition"),
        ("".join(f"首页推荐阅读第一期\n第{i}行的话各不相同，因此很长很长很长\n" for i in range(12)), None),
        ("锟斤拷锟斤拷，这是一个网页的内容", "mojibake"),
        ("烫烫烫烫烫烫烫烫烫烫烫", "mojibake"),
        ("鏄剧ず涓枃锛屾枃瀛椼€傛槸", "mojibake"),
        ("ä¸­æ–‡å­—ç¬¦ ä¸­æ–‡å­—ç¬¦", "mojibake"),
        ("ÖÐ¹úÈËÃñ¹²ºÍ¹ú ÖÐ¹ú", "mojibake"),
        ("It isnâ€™t a good text, it isnâ€™t.", "mojibake"),
        ("坏\ufffd\ufffd\ufffd了的文字在这里", "mojibake"),
        ("烫，烫烫烫！他叫道。屯屯是个好孩子。", None),
        ("如果用错误的编码读一个网页，常常会看到锟斤拷这三个字，" + "它们是替换字符的编码连在一起之后的样子。" * 9, None),
        ("Café à côté de l’été, où naïveté où maïs. Größe, Übermut und Straße. El niño está aquí, ¿qué más?", None),
    ],
)
def test_judging(text, dropped_by):
    assert Cleaner()(text)[1] == dropped_by


def test_limits_are_settings():
    assert Cleaner(min_chars=4)("一二三")[1] == "short"
    assert Cleaner(min_chars=3)("一二三")[1] is None
    assert Cleaner(max_chars=11)("一二三四五六七八九十一二")[1] == "long"
    assert Cleaner(max_chars=12)("一二三四五六七八九十一二")[1] is None


def test_songs_and_poems_with_refrains_stay():
    verses = [f"第{word}段的词句各有各的样子\n写着{word}种不同的山和水" for word in "一二三四五六七八"]
    song = "\n".join(verse + "\n合唱：\n啊故乡的云\n啊故乡的风\n带我回到那里\n再听一回钟声" for verse in verses[:4])
    assert Cleaner()(song) == (song, None, ())
    assert Cleaner()("采采芣苢，薄言采之。\n采采芣苢，薄言有之。\n" * 3)[1] is None


# ----------------------------------------------------------------------------------------------------------------------
# Clean texts stay as they are

GOOD = {
    "prose": "那年冬天，祖母种了一棵树——她说：“等它开花，你就回来了……”我点点头（其实并不明白）。\n\n后来呢？后来我走了！",
    "verse": "山行\n无名\n云起千峰远，风来一叶轻。\n山行人不见，唯有暮钟声。",
    "law": "第十二条 本法自2020年1月1日起施行。\n（一）未经许可转载他人作品的；\n（二）其他情形，处以百分之五以下罚款。",
    "markdown": (
        "# 标题\n\n---\n\n* 一\n* 二[链接](https://example.com/a?b=1&c=2)\n\n| 名 | 值 |\n|:--|--:|\n"
        "| a | 1.5 |\n\n> 引用<sup>1</sup>\n\n```html\n<p>HTML</p>\n```"
    ),
    "python": (
        'import re\n\n\ndef f(items: list[int]) -> dict[str, "Any"]:\n    """一。。二"""\n'
        '    if items[1] < 3 and items[0] > 2:\n        return {"<p>": "&lt;"}\n'
        '    return None  # !!!!\n'
    ),
    "c++": "#include <vector>\nstd::vector<int> v; for (int i = 0; i<n && n>0; ++i) { a[1] = &num; }",
    "latex": r"\begin{align} f(x) &= \sum_{i<n} x_i^{2} \\ &\leq \ldots \end{align} 其中 $a<b$，$c>d$，区间$[1,2]$。",
    "english": "It's a “good” day — isn't it? See R&D (pp. 1-2)... Yes!\n\nMr. O’Neill paid $3.50, i.e. 20% more.",
    "numbers": "年份,甲,乙\n2019,1.5,-0.2\n2020,2.25,+0.1\n2021,3.125,13800000000.5",
    "emoji": "今天天气真好😀👨\u200d👩\u200d👧❤️，一起去玩吧～",
    "dialogue": "甲：数组[1]是什么？\n乙：是第二个元素，数组从[0]开始。",
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_good_texts_stay(kind):
    text = GOOD[kind].strip()
    assert Cleaner(mask_pii=True)(text) == (text, None, ())


def test_a_dirty_page():
    page = (
        "\ufeff<html><body><h1>标题Ａ</h1>\r\n<p>\u3000\u3000他于１９９０年出生[1]。。&nbsp;后来！！！！！</p>\n"
        "<p>扫码关注公众号</p></body></html>"
    )
    assert clean(page) == (
        "标题A\n\n他于1990年出生。 后来！！！", None,
        ("control", "markup", "spaces", "width", "punctuation", "citations", "advertising"),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# All rules together

PIECES = [*"<>&;[]〔〕。，！？…—-.=`/ \n\t\u3000\xa0\u200b\u200d\ufeff\x00\ue000\ufffdaA1Ａ１．％年人春Ã¤é@", "<p>",
          "</p>", "<b>", "</b>", "<br>", "&lt;",
          "&gt;", "&amp;", "`", "~~~", "\n\n    a", "&nbsp;", "&#60;", "&#13;", "&#xd800;", "<script>", "</script>", "<!--", "-->", "```",
          "[1]", "[注 1]", "[0]", "数组", "\r\n", "\ud83d",
          "扫码关注", "公众号", "上一篇：", "转载请注明", "锟斤拷", "HTML", "import os", "13812345678",
          "11010519491231002X", "a@b.cn", "。。", "-" * 60]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once(text):
    once, dropped_by, _ = clean(text)
    once.encode("utf-8")
    assert once == once.strip()
    if dropped_by is None:
        assert clean(once) == (once, None, ())
    message, _ = clean.mend(text)
    assert clean.mend(message) == (message, ())


def test_a_text_that_does_not_settle_stays():
    text = "一段很长的普通文字" * 9
    assert clean("&" + "amp;" * 5 + text) == ("&" + text, None, ("markup",))
    assert clean("&" + "amp;" * 12 + text) == ("&amp;amp;" + text, None, ("markup",))


# What the patterns of a rule begin with, over and over, so that every position is a false start.
HOSTILE = {
    "control": ["\u200d", "年\ue000"],
    "markup": ["<", "<p ", "<p a=", "<p  ", "<b>", "<script>", "<style", "<!--", "<!-- -", "&amp", "&amp;", "\n "],
    "spaces": [" ", "\u3000", " \u3000", "\n", "\xa0", "\r"],
    "width": ["Ａ", "1％", "１．"],
    "punctuation": ["。", "-", "。，", "…—", "- "],
    "citations": ["[1", "[1]", "年[1 ", "〔1", "年[1-", "[注"],
    "advertising": ["微信", "上一页 | ", "扫码\n", "转载" + "一" * 50 + "\n", "://", "  "],
    "personal": ["1", "1 ", "13", "编号 ", "a", "a.", "a@a.", "@", "86 "],
    "short": [" ", "\u3000"],
    "long": ["a"],
    "mojibake": ["Ã", "锟斤", "â€", "烫"],
    "symbols": ["-", " ", "_", "□"],
    "repetition": ["\n", " \n", "一\n"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_rule_is_linear_on_hostile_texts(name):
    """A quadratic rule would need minutes for these 2 MB, a linear one less than a second."""
    for piece in HOSTILE[name]:
        start = time.process_time()
        RULES[name].apply(piece * (2_000_000 // len(piece.encode("utf-8", "surrogatepass"))) + "年")
        assert time.process_time() - start < 15, piece


@pytest.mark.slow
def test_hostile_texts_are_known_for_every_rule():
    assert set(HOSTILE) == set(RULES) - {"simplify"}
    start = time.process_time()
    for line in ("return (", "if (", "import ", "   ", "public x"):  # the test for source code
        clean((line + "\n") * 100_000 + "。。")
    for piece in ("`", "```a", "~~~\n", "\n~~~", "\n\n    ", "\n\n    a", "\n\n\t\t", "`a\n"):  # and that for pieces of code
        clean(piece * 100_000 + "好。。")
        clean("好。。" + piece * 100_000)
    assert time.process_time() - start < 15


# ----------------------------------------------------------------------------------------------------------------------
# Switching rules


@pytest.mark.parametrize("name", list(MENDED))
def test_a_rule_can_be_switched_off(name):
    text = "前面是一段普通的文字\n" + MENDED[name][0][0]
    assert name in clean(text)[2]
    assert name not in Cleaner((name,), min_chars=1, mask_pii=True)(text)[2]
    assert Cleaner(tuple(RULES))(MENDED[name][0][0]) == (MENDED[name][0][0].strip(), None, ())


def test_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match=r"no cleaning rule 'markupp'; did you mean markup\? There are simplify, control, markup"):
        Cleaner(("markupp",))


def test_names_are_those_of_the_active_rules():
    assert Cleaner().names == tuple(name for name in RULES if name not in ("simplify", "personal"))
    assert Cleaner(("markup", "short"), mask_pii=True).names[:2] == ("control", "spaces")
    assert "personal" in Cleaner(mask_pii=True).names and Cleaner(tuple(RULES)).names == ()


def test_personal_data_is_masked_only_when_asked():
    assert Cleaner()("我的电话是13812345678，请打来。")[0] == "我的电话是13812345678，请打来。"


def test_messages_are_mended_by_the_rules_that_spare_questions():
    question = "<p>&lt;</p> Ａ１ 出生[1]。\n扫码关注公众号"
    assert clean.mend(question) == (question, ())
    assert clean.mend("好\u200b\xa0好。。") == ("好 好。", ("control", "spaces", "punctuation"))
    for message in (
        "姓\u3000名", '```\ns.replace("\u3000", " ")\n```', 'if c == "\u3000":', "甲，，，乙\n| ，， | 。。 |",
        '`x = "。。。"`',
    ):  # fmt: skip
        assert clean.mend(message) == (message, ())
    assert clean.mend("") == ("", ())


def test_simplify(monkeypatch):
    calls = []

    class OpenCC:
        def __init__(self, table):
            assert table == "t2s"

        def convert(self, text):
            calls.append(text)
            return text.replace("發", "发")

    monkeypatch.setitem(sys.modules, "opencc", types.SimpleNamespace(OpenCC=OpenCC))
    cleaning._opencc.cache_clear()
    assert Cleaner(simplify=True)("發展之後再發展，發展不停。") == ("发展之後再发展，发展不停。", None, ("simplify",))
    assert Cleaner(simplify=True)("發展。。發展之後再發展") == ("发展。发展之後再发展", None, ("simplify", "punctuation"))
    assert calls == ["發展之後再發展，發展不停。", "發展。。發展之後再發展"]  # once for each text
    assert Cleaner()("發展之後再發展，發展不停。")[2] == ()
    monkeypatch.setitem(sys.modules, "opencc", None)
    cleaning._opencc.cache_clear()
    with pytest.raises(UserError, match="pip install opencc"):
        Cleaner(simplify=True)
    cleaning._opencc.cache_clear()


@pytest.mark.parametrize(("number", "valid"), [
    ("11010519491231002X", True), ("11010519491231002x", True), ("440524188001010014", True), ("110105194912310020", False),
    ("440524188001010015", False),
])  # fmt: skip
def test_identity_numbers_by_the_standard_s_own_examples(number, valid):
    assert is_identity_number(number) is valid


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand


@pytest.mark.parametrize(
    ("argument", "dropped"),
    [("chinese-poetry=pretrain/chinese-poetry", 1), ("txt=pretrain/niutrans-classics", 0), ("txt=pretrain/laws", 0)],
)
def test_real_samples_lose_nothing(argument, dropped):
    """No letter and no digit goes but those in the comments of the laws; of the other signs only repeated punctuation."""
    name, _, path = argument.partition("=")
    if not (SHARED / path).exists():
        pytest.skip("the real samples are not here")
    reasons, lost, cleaner = [], Counter(), Cleaner(min_chars=1)
    for _, text in Corpus.from_argument(f"{name}={SHARED / path}", PRETRAINING).records():
        if text.strip():
            cleaned, reason, _ = cleaner(text)
            reasons += [reason] if reason else []
            before, after = (
                Counter("".join(unicodedata.normalize("NFKC", t).split())) for t in (re.sub("<!--.*?-->", "", text), cleaned)
            )
            lost += before - after
    assert reasons == ["mojibake"] * dropped
    lost = {sign: count for sign, count in lost.items() if unicodedata.category(sign)[0] != "C"}
    assert set(lost) <= {"。"}  # of 。。
