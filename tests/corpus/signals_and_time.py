"""Timeouts by an alarm, handlers of signals, timers, clocks, a schedule."""

# %%
import sched
import signal
import threading
import time


class TooSlow(Exception):
    pass


def limit(number, frame):
    raise TooSlow(f"signal {signal.Signals(number).name}")


before = signal.signal(signal.SIGALRM, limit)
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    time.sleep(5)
except TooSlow as error:
    print("stopped by", error)
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)

# %%
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
signal.raise_signal(signal.SIGUSR1)
print(got == [signal.SIGUSR1])

# %%
plan, order, begun = sched.scheduler(time.monotonic, time.sleep), [], time.monotonic()
for delay, name in ((0.03, "late"), (0.01, "soon"), (0.02, "later")):
    plan.enterabs(begun + delay, 1, order.append, (name,))
plan.run()
timer = threading.Timer(0.01, order.append, ["timer"])
timer.start()
timer.join()
order
