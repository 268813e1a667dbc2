"""Read an RSS feed with namespaces, and write it as Atom, a calendar and a mail."""

# %%
import email
import xml.etree.ElementTree as ET
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import parsedate_to_datetime

FEED = """<?xml version="1.0"?>
<rss version="2.0" xmlns:dc="http://purl.org/dc/elements/1.1/"><channel><title>News</title>
<item><title>Größe &amp; Maß</title><dc:creator>Ann</dc:creator>
<pubDate>Tue, 12 Mar 2024 10:00:00 GMT</pubDate></item>
<item><title>Second</title><dc:creator>Bob</dc:creator><pubDate>Wed, 13 Mar 2024 23:30:00 -0500</pubDate></item>
</channel></rss>"""
NAMES = {"dc": "http://purl.org/dc/elements/1.1/"}
items = [
    {
        "title": item.findtext("title"),
        "by": item.findtext("dc:creator", namespaces=NAMES),
        "when": parsedate_to_datetime(item.findtext("pubDate")),
    }
    for item in ET.fromstring(FEED).iter("item")
]
for item in items:
    print(f"{item['when'].isoformat()} {item['by']}: {item['title']}")

# %%
ET.register_namespace("", "http://www.w3.org/2005/Atom")
feed = ET.Element("{http://www.w3.org/2005/Atom}feed")
for item in items:
    entry = ET.SubElement(feed, "{http://www.w3.org/2005/Atom}entry")
    ET.SubElement(entry, "{http://www.w3.org/2005/Atom}title").text = item["title"]
ET.indent(feed)
ET.ElementTree(feed).write("feed.xml", encoding="utf-8", xml_declaration=True)
print(open("feed.xml", encoding="utf-8").read())

# %%
mail = EmailMessage(policy=SMTP)
mail["Subject"], mail["To"], mail["From"] = items[0]["title"], "Ünal <u@example.org>", "news@example.org"
mail.set_content("\n".join(item["title"] for item in items))
again = email.message_from_bytes(bytes(mail), policy=SMTP)
again["Subject"]
