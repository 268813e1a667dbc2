import { useSignal } from "@preact/signals";
import { get } from "../api";
import { share, signIn } from "../key";
import { health } from "../store";
import { Trouble, useWork } from "../ui";
import { ThemeMenu } from "./Theme";

/** Asks for the key, in a real form, so that password managers know it. */
export function SignIn() {
  const given = useSignal("");
  const work = useWork();
  const submit = (event: Event) => {
    event.preventDefault();
    const key = given.value.trim();
    void work.run(
      () => get("/limits", { headers: { Authorization: `Bearer ${key}` } }),
      () => signIn(key),
    );
  };
  return (
    <main class="signin">
      <header>
        <img src="ui/icon.svg" alt="" width="40" height="40" />
        <h1>CellVM</h1>
        <p class="muted">
          {health.value?.version} at {location.host}
        </p>
      </header>
      {share.value && (
        <p class="banner" role="alert">
          The link that you came with is not good any more. It has expired or was revoked, or its sandbox has ended.
        </p>
      )}
      <form onSubmit={submit}>
        <input type="text" name="username" autocomplete="username" value={location.host} hidden readOnly />
        <label for="key">API key</label>
        <div class="row">
          <input
            id="key"
            name="password"
            type="password"
            autocomplete="current-password"
            required
            autofocus
            spellcheck={false}
            value={given.value}
            onInput={(event) => {
              given.value = event.currentTarget.value;
            }}
          />
          <button type="submit" class="primary" disabled={work.isBusy.value}>
            Sign in
          </button>
        </div>
        <Trouble error={work.error.value} />
        <p class="muted">
          <code>make serve</code> printed one when it started first. <code>cellvm keys add</code> makes another.
        </p>
      </form>
      <footer>
        <ThemeMenu />
      </footer>
    </main>
  );
}
