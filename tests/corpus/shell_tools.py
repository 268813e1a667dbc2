"""What people do with programs: pipes, exit codes, environment, timeouts, and output that is not captured."""

# %%
import os
import subprocess
import sys

print(
    "sorted:",
    subprocess.run("printf 'b\\nc\\na\\n' | sort -r", shell=True, capture_output=True, text=True).stdout.split(),
)
print("code:", subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode)
print(
    "env:",
    subprocess.check_output(
        ["sh", "-c", "echo $GREETING"], env={**os.environ, "GREETING": "grüß dich"}, text=True
    ).strip(),
)

# %%
try:
    subprocess.run(["sleep", "10"], timeout=0.05)
except subprocess.TimeoutExpired as error:
    print("timeout:", error.cmd)
try:
    subprocess.run(["no-such-program"])
except FileNotFoundError as error:
    print("missing:", error.filename)
try:
    subprocess.run("echo wrong >&2; false", shell=True, check=True, stderr=subprocess.PIPE)
except subprocess.CalledProcessError as error:
    print(error.returncode, error.stderr)

# %%
print("before", flush=True)
subprocess.run(["echo", "日本語 from a child"])
print("between", flush=True)
os.system("echo from a shell")
os.write(1, b"from a descriptor\n")
subprocess.run("echo to the error stream >&2", shell=True)
print("after")

# %%
with subprocess.Popen(["tr", "a-z", "A-Z"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    out, _ = process.communicate("through a filter\n")
out
