// Draws the figures of a report. Everything it needs is in the page: plotly.js and the figures lie there compressed, and a figure
// is drawn when it comes near the screen or when there is nothing else to do.
(async () => {
  "use strict";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const state = { chosen: null, figures: new Map() };
  window.equipoise = { drawn: 0, wanted: 0, slowest: 0, ready: null, done: null }; // for tests and for the curious

  const theme = () => state.chosen ?? (system.matches ? "dark" : "light");

  async function unpack(id) {
    const binary = atob(document.getElementById(id).textContent.trim());
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // A value with "light" and "dark" is the one of the theme; rows of numbers and words are left as they are.
  function themed(value) {
    if (Array.isArray(value)) return value.length && typeof value[0] === "object" && !Array.isArray(value[0]) ? value.map(themed) : value;
    if (value === null || typeof value !== "object") return value;
    if ("light" in value && "dark" in value) return value[theme()];
    return Object.fromEntries(Object.entries(value).map(([name, own]) => [name, themed(own)]));
  }

  function draw(figure) {
    const view = figure.spec.views[figure.view];
    const layout = themed(view.layout);
    if (figure.plot.clientWidth < 520) {
      layout.margin = { ...layout.margin, r: 4 };
      layout.font.size = 11;
    }
    figure.plot.style.minHeight = `${layout.height}px`; // the page does not jump while the view is drawn
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    const data = themed(view.data);
    if (figure.plot.clientWidth < 520 && data[0].x?.length > 5) delete data[0].texttemplate; // figures in cells need room
    const start = performance.now();
    window.Plotly.newPlot(figure.plot, data, layout, config);
    window.equipoise.slowest = Math.max(window.equipoise.slowest, performance.now() - start);
    if (!figure.fresh) window.equipoise.drawn += 1;
    figure.fresh = true;
    figure.theme = theme();
  }

  function show(figure, index) {
    figure.view = index;
    const view = figure.spec.views[index];
    figure.buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === index)));
    figure.note.textContent = view.note;
    figure.badges.replaceChildren(...view.origins.flatMap((origin) => {
      const badge = document.createElement("span");
      badge.className = `badge ${origin}`;
      badge.textContent = origin;
      return [badge, " "];
    }));
    draw(figure);
  }

  function setTheme() {
    root.dataset.theme = theme();
    button.textContent = theme() === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `switch to ${theme() === "dark" ? "light" : "dark"} colours`);
    for (const figure of state.figures.values()) if (figure.fresh && figure.theme !== theme()) draw(figure);
  }

  button.addEventListener("click", () => { state.chosen = theme() === "dark" ? "light" : "dark"; setTheme(); });
  system.addEventListener("change", setTheme);
  setTheme();

  let specs;
  try {
    const [code, text] = await Promise.all([unpack("plotly"), unpack("figures")]);
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    specs = JSON.parse(text);
    if (!window.Plotly) throw new Error("plotly.js did not start");
  } catch (error) {
    document.querySelectorAll(".plot").forEach((plot) => {
      plot.style.minHeight = "0";
      plot.innerHTML = '<p class="problem">This browser cannot draw the figures; their tables are below each of them.</p>';
    });
    throw error;
  }

  for (const spec of specs) {
    const section = document.getElementById(spec.key);
    const figure = {
      spec, view: 0, fresh: false,
      plot: section.querySelector(".plot"), note: section.querySelector(".note"), badges: section.querySelector(".badges"),
      buttons: [...section.querySelectorAll(".views button")],
    };
    figure.buttons.forEach((b, i) => b.addEventListener("click", () => show(figure, i)));
    state.figures.set(spec.key, figure);
  }
  window.equipoise.wanted = state.figures.size;
  window.equipoise.ready = performance.now();

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = state.figures.get(entry.target.id);
      if (entry.isIntersecting && !figure.fresh) draw(figure);
    }
  }, { rootMargin: "300px" });
  for (const key of state.figures.keys()) near.observe(document.getElementById(key));

  // The rest one by one, so that scrolling and clicking are never held up by more than one figure.
  const later = window.requestIdleCallback ?? ((work) => setTimeout(work, 30));
  const queue = [...state.figures.values()];
  const next = () => {
    const figure = queue.find((f) => !f.fresh);
    if (!figure) { window.equipoise.done = performance.now(); return; }
    draw(figure);
    later(next, { timeout: 200 });
  };
  later(next, { timeout: 200 });

  window.addEventListener("beforeprint", () => {
    state.before = state.chosen;
    state.chosen = "light";
    for (const figure of queue) if (!figure.fresh) draw(figure);
    setTheme();
  });
  window.addEventListener("afterprint", () => { state.chosen = state.before; setTheme(); });
})();
