"""Make a melody as a WAV file, and look at its spectrum by a small Fourier transform."""

# %%
import cmath
import math
import struct
import wave

RATE = 4000
NOTES = [440.0, 550.0, 660.0]
samples = [0.5 * math.sin(2 * math.pi * note * n / RATE) for note in NOTES for n in range(512)]
with wave.open("melody.wav", "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(RATE)
    file.writeframes(b"".join(struct.pack("<h", int(each * 32767)) for each in samples))


# %%
def fft(values):
    if len(values) == 1:
        return values
    even, odd = fft(values[::2]), fft(values[1::2])
    turned = [cmath.exp(-2j * cmath.pi * k / len(values)) * odd[k] for k in range(len(odd))]
    return [a + b for a, b in zip(even, turned)] + [a - b for a, b in zip(even, turned)]


with wave.open("melody.wav") as file:
    print(file.getparams()[:4])
    found = struct.unpack(f"<{file.getnframes()}h", file.readframes(file.getnframes()))
for number in range(3):
    spectrum = fft([complex(each) for each in found[number * 512 : number * 512 + 512]])
    peak = max(range(1, 256), key=lambda k: abs(spectrum[k]))
    print(f"{peak * RATE / 512:.1f} Hz")

# %% notebook
# from IPython.display import Audio, display
# display(Audio("melody.wav"))

# %%
len(found)
