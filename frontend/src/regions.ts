/** F6 moves between the parts of the page, because Tab is a key like others in an editor and in a terminal. */

const REGIONS = "header.top, nav.bar, main, aside:not([hidden])";
const FOCUSABLE = "a[href], button:not([disabled]), input:not([hidden]), textarea, [tabindex]";

/** Lets F6 and Shift+F6 move between the regions. */
export function moveBetweenRegions(): void {
  addEventListener("keydown", (event) => {
    if (event.key !== "F6" || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    toRegion(event.shiftKey ? -1 : 1);
  });
}

/** Goes to the region after the one that has the focus, or to the one before it. */
export function toRegion(by: 1 | -1): void {
  const regions = [...document.querySelectorAll(REGIONS)].filter((each) => each.querySelector(FOCUSABLE));
  const at = regions.findIndex((each) => each.contains(document.activeElement));
  const next = regions.at((Math.max(at, by > 0 ? -1 : 0) + by) % regions.length);
  next?.querySelector<HTMLElement>(FOCUSABLE)?.focus();
}
