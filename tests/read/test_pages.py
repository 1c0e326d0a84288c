"""The page of a reading: complete, and nothing that was read can become HTML."""

from tokenry.read.contract import Reading


class Drawn(Reading):
    def picture(self) -> str:
        return '<div class="panel">drawn</div>'


def test_page_holds_every_cell_escaped():
    rows = [
        {"token": "<script>alert(1)</script>", "value": 0.123456, "keys": [1, None]},
        {"token": "b", "value": None, "keys": []},
    ]
    page = Drawn("what <b> says", rows).to_html()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "what &lt;b&gt; says" in page
    assert "<td>0.1235</td><td>1 -</td>" in page and "<td>b</td><td>-</td><td></td>" in page
    assert page.index("drawn") < page.index("<table>")


def test_an_empty_reading_has_a_page():
    assert "<h1>nothing</h1>" in Reading("nothing", []).to_html()
