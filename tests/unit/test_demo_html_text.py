"""Documentation pages become the text a reader sees."""

from __future__ import annotations

from kvtrace_recorder.demo.html_text import html_to_text

PAGE = """<html><head><title>skipped</title></head><body>
<div class="sphinxsidebar"><p>navigation</p></div>
<div class="body" role="main">
 <h1>json &#8212; encoder<a class="headerlink" href="#x">&#182;</a></h1>
 <p>Read   a <code>file</code>,
    then <em>stop</em>.</p>
 <div class="highlight"><pre>if x:
    y = 1  # &lt;keep&gt;</pre></div>
 <script>var hidden = "</p>";</script>
 <ul><li>first</li><li><p>second</p></li></ul>
 <div class="table-contents"><table><tr><td>a</td><td>b</td></tr></table></div>
</div>
<div class="footer">Copyright</div></body></html>"""


def test_content_is_kept_and_navigation_is_not() -> None:
    text = html_to_text(PAGE)
    assert "json — encoder\n" in text
    assert "Read a file, then stop." in text
    for unwanted in ("skipped", "navigation", "hidden", "Copyright", "¶"):
        assert unwanted not in text


def test_preformatted_text_keeps_its_indentation() -> None:
    assert "if x:\n    y = 1  # <keep>" in html_to_text(PAGE)


def test_lists_are_tight_and_tables_keep_their_cells() -> None:
    text = html_to_text(PAGE)
    assert "- first\n- second" in text
    assert "a b" in text


def test_a_page_without_known_markup_gives_its_body() -> None:
    assert html_to_text("<body><p>one<p>two</body>") == "one\n\ntwo\n"
    assert html_to_text("no markup") == "no markup\n"
