// The look that was chosen. gradio reads it from the address; where it has done so already, the mark that it sets is set.
(() => {
  try {
    const chosen = localStorage.getItem("fluxgui-theme") || "THEME";
    const url = new URL(location.href);
    if (chosen === "dark" || chosen === "light") url.searchParams.set("__theme", chosen);
    else if (localStorage.getItem("fluxgui-theme")) url.searchParams.delete("__theme");
    if (url.href !== location.href) history.replaceState(null, "", url);
    const show = () => document.body.classList.toggle("dark", chosen === "dark");
    if (chosen === "dark" || chosen === "light") document.body ? show() : addEventListener("DOMContentLoaded", show);
  } catch (error) { /* no storage in this browser: as the system has it */ }
})();

// Notifications at the end of a run, on every page, also while it is in the background.
(() => {
  const live = ["queued", "starting", "running", "paused", "stuck"];
  let known = null;
  const look = async () => {
    if (localStorage.getItem("fluxgui-notify") !== "1" || !("Notification" in window) || Notification.permission !== "granted") {
      known = null;
      return;
    }
    try {
      const answer = await fetch("run-states", {cache: "no-store"});
      if (!answer.ok) return;
      const states = await answer.json();
      for (const [id, run] of Object.entries(states)) {
        const before = known && known[id];
        if (before && live.includes(before.state) && !live.includes(run.state)) {
          const note = new Notification("FluxGUI", {body: run.text, tag: id});
          note.onclick = () => { window.focus(); location.search = "?tab=runs&run=" + encodeURIComponent(id); };
        }
      }
      known = states;
    } catch (error) { /* the page's program is not there at this moment */ }
  };
  setInterval(look, 5000);
})();
