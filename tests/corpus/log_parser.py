"""Parse a web server's log: who asks most, which pages fail, traffic by hour."""

# %%
import re
from collections import Counter
from datetime import datetime

LOG = """\
10.0.0.1 - - [12/Mar/2024:10:01:22 +0000] "GET /index.html HTTP/1.1" 200 5123
10.0.0.2 - ann [12/Mar/2024:10:05:01 +0000] "POST /login HTTP/1.1" 302 0
10.0.0.1 - - [12/Mar/2024:11:15:59 +0000] "GET /missing.png HTTP/1.1" 404 210
10.0.0.3 - - [12/Mar/2024:11:16:00 +0000] "GET /api/items?page=2 HTTP/2.0" 500 17
a broken line
10.0.0.1 - - [12/Mar/2024:12:00:00 +0000] "GET /index.html HTTP/1.1" 304 -
"""
LINE = re.compile(
    r'(?P<host>\S+) \S+ (?P<user>\S+) \[(?P<time>[^\]]+)\] '
    r'"(?P<method>\w+) (?P<path>\S+) [^"]+" (?P<status>\d{3}) (?P<size>\d+|-)'
)

# %%
found, broken = [], 0
for line in LOG.splitlines():
    if match := LINE.match(line):
        found.append(match.groupdict())
    else:
        broken += 1
print(f"{len(found)} requests, {broken} broken lines")

# %%
hours = Counter(datetime.strptime(each["time"], "%d/%b/%Y:%H:%M:%S %z").hour for each in found)
for hour, count in sorted(hours.items()):
    print(f"{hour:02d}h {'#' * count}")
traffic = sum(int(each["size"]) for each in found if each["size"] != "-")
print("traffic:", traffic)
failed = [each["path"] for each in found if int(each["status"]) >= 400]
failed
