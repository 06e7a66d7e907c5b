from __future__ import annotations


def test_the_text_of_a_page():
    from debian_texts import text_of

    page = """<html><head><title>no</title><style>p {}</style></head><body><h1>Of  rivers</h1><p>They
    run<br/>down &amp; out.</p><pre>  $ ls
    a  b</pre><script>alert(1)</script></body></html>"""
    assert text_of(page) == "Of rivers\n\nThey run\ndown & out.\n\n  $ ls\n    a  b"
