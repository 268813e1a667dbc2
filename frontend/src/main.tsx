/** Mounts the page. This is the only module that knows all parts. */
import { render } from "preact";
import { get } from "./api";
import { follow } from "./feed";
import { guard } from "./frame";
import { findKey, key, share } from "./key";
import { moveBetweenRegions } from "./regions";
import { followAddress, route } from "./route";
import { BoxScreen } from "./screens/Box";
import { Help } from "./screens/Help";
import { List } from "./screens/List";
import { SignIn } from "./screens/SignIn";
import { applyTheme } from "./screens/Theme";
import { type Health, health, now, said } from "./store";

function App() {
  const where = share.value ? { ...route.value, id: share.value.id } : route.value;
  return (
    <>
      {!key.value ? <SignIn /> : where.id ? <BoxScreen key={where.id} route={where} /> : <List />}
      <Help />
      <p class="hidden" role="status" aria-live="polite">
        {said.value}
      </p>
    </>
  );
}

findKey();
applyTheme();
followAddress();
guard();
moveBetweenRegions();
render(<App />, document.body);
follow();
if (!key.value) {
  void get<Health>("/health").then(
    (told) => {
      health.value = told;
    },
    () => {}, // the form works without the server's version
  );
}
setInterval(() => {
  now.value = Date.now();
}, 1000);
