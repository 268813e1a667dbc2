/** Numbers and reasons in words. Pure. */

/** Why a sandbox has ended, by the server's word. */
export const REASONS: Record<string, string> = {
  kill: "it was ended on request",
  timeout: "its lifetime was over",
  died: "its machine ended by itself",
  disk_full: "the server's disk was full, and it took most of it",
  server_stopped: "the server was stopped",
  host_restart: "the server was killed or the host restarted",
  start_failed: "its machine did not start",
  key_removed: "its key was removed",
  files_lost: "it was paused, and its files are gone",
};

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** A number of bytes: "1.2 MB". */
export function bytes(count: number): string {
  let unit = 0;
  let value = count;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 10 ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
}

/** A span of seconds: "0:42", "58:01", "1:02:03". */
export function clock(seconds: number): string {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, index) => (index ? String(part).padStart(2, "0") : String(part))).join(":");
}

/** How long a cell has run: "0.8 s", "3:12". */
export function duration(milliseconds: number): string {
  const seconds = Math.max(0, milliseconds) / 1000;
  return seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : clock(seconds);
}

/** The time of day of a moment; empty for what is none. */
export function time(moment: string | number): string {
  const date = new Date(moment);
  return Number.isNaN(date.getTime()) ? "" : date.toLocaleTimeString([], { hourCycle: "h23" });
}

/** A name that a guest or a client chose, as one line, with what would turn or hide text made visible. */
export function safe(text: string): string {
  return text.replace(/[\p{Cc}\p{Cf}\u2028\u2029]/gu, "\u00b7");
}
