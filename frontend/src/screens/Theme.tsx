import { signal } from "@preact/signals";
import { Menu } from "../ui";

const NAME = "cellvm.theme";
const THEMES = { "": "As the system", light: "Light", dark: "Dark" };
type Theme = keyof typeof THEMES;

const theme = signal<Theme>((localStorage.getItem(NAME) as Theme) ?? "");

/** Shows the theme that was chosen. */
export function applyTheme(): void {
  document.documentElement.dataset.theme = theme.value;
}

export function ThemeMenu() {
  return (
    <Menu label="Theme" text="◐">
      {(Object.keys(THEMES) as Theme[]).map((each) => (
        <button
          key={each}
          type="button"
          aria-pressed={theme.value === each}
          onClick={() => {
            theme.value = each;
            localStorage.setItem(NAME, each);
            applyTheme();
          }}
        >
          {THEMES[each]}
        </button>
      ))}
    </Menu>
  );
}
