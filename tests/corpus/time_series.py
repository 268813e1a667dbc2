"""Resample sensor readings to hours, fill gaps and find outliers."""

# %%
import random
import statistics
from datetime import datetime, timedelta, timezone

rng = random.Random(42)
start = datetime(2024, 3, 30, 22, tzinfo=timezone.utc)
readings = [(start + timedelta(minutes=7 * n), 20 + rng.gauss(0, 1)) for n in range(60) if n % 11]
readings[20] = (readings[20][0], 95.0)
print(len(readings), "readings from", readings[0][0].isoformat())

# %%
hours = {}
for when, value in readings:
    hours.setdefault(when.replace(minute=0), []).append(value)
medians = {hour: statistics.median(values) for hour, values in hours.items()}
center = statistics.median(value for _, value in readings)
spread = statistics.median(abs(value - center) for _, value in readings)
outliers = [
    (when.strftime("%d %H:%M"), round(value, 1)) for when, value in readings if abs(value - center) > 6 * spread
]
print("outliers:", outliers)

# %%
for hour, value in medians.items():
    print(f"{hour:%a %H:%M} {value:6.2f} {'=' * round(value)}")

# %%
from zoneinfo import ZoneInfo

local = {hour.astimezone(ZoneInfo("Europe/Berlin")).strftime("%d %H:%M %Z") for hour in medians}
sorted(local)[:4]
