"""The report's page: HTML, CSS, and the JavaScript that draws the figures. `fill` replaces %%NAME%% with a part."""

PAGE = """<!doctype html>%%MARKER%%
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>%%TITLE%%</title>
<link rel=icon href="data:,">
<style>%%STYLE%%</style>
</head>
<body>
<main>
<h1>%%TITLE%%</h1>
<p class=note>Made %%WHEN%%. Drag over a figure to zoom, double-click to reset, click a name below it to hide its
curve. A long curve is downsampled: it is cut into equal parts, and the lowest and highest point of each are drawn.</p>
<noscript><p>The figures need JavaScript.</p></noscript>
%%BODY%%
</main>
<script type="application/json" id=figures>%%FIGURES%%</script>
<script type="application/gzip" id=plotly>%%PLOTLY%%</script>
<script>%%SCRIPT%%</script>
</body>
</html>
"""

STYLE = """
:root { --text: #1c1c1e; --quiet: #5f6368; --back: #ffffff; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --quiet: #a3a8ae; --back: #16181b; --line: #3a3f45; }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; margin: 0.5rem 0; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.5rem 0 0.25rem; }
.note { color: var(--quiet); margin: 0.25rem 0; }
.figure { height: 22rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; }
.legend button { font: inherit; color: inherit; background: none; border: 0; padding: 0.4rem 0; cursor: pointer; }
.legend button { text-align: left; overflow-wrap: anywhere; }
.legend .hidden { opacity: 0.4; text-decoration: line-through; }
.legend svg { width: 2rem; height: 0.8rem; margin-right: 0.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: normal; color: var(--quiet); }
td, th { overflow-wrap: break-word; max-width: 30rem; }
#events td:nth-last-child(2) { min-width: 16rem; }
#sampled td { white-space: pre-wrap; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.2rem; margin: 1rem 0; }
nav a { color: inherit; }
summary { cursor: pointer; padding: 0.5rem 0; }
pre { overflow-x: auto; font-size: 16px; }
"""

SCRIPT = """
"use strict";
// Unpack plotly.js, then draw each figure when it comes near the window, in the colours of the page.
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll("[data-figure]")];
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  try {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  } catch (error) {
    for (const place of places) place.textContent = "This browser is too old for the figures: " + error;
    return;
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const lines = () => ({
    gridcolor: dark.matches ? "#3a3f45" : "#e3e5e8", zeroline: false, automargin: true, exponentformat: "e",
  });
  const styled = axis => ({ ...lines(), ...axis });
  const layout = spec => ({
    ...spec,
    xaxis: styled(spec.xaxis), yaxis: styled(spec.yaxis), ...(spec.xaxis2 && { xaxis2: styled(spec.xaxis2) }),
    font: { size: 16, color: dark.matches ? "#e6e6e6" : "#1c1c1e" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 10, r: 10, t: 10, b: 10 },
    showlegend: false, // the page has its own legend, which wraps
    hovermode: "closest", dragmode: touch ? false : "zoom", // with zoom, touching a figure would not scroll the page
  });
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const symbols = {
    x: "\\u2716", diamond: "\\u25c6", "triangle-up": "\\u25b2", "triangle-left": "\\u25c0", "line-ns": "\\u2759",
  };
  const dashes = { dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" };
  const swatch = trace => {
    if (trace.mode === "markers") {
      const mark = document.createElement("span");
      mark.style.color = (trace.marker || trace.line).color;
      mark.textContent = (symbols[trace.marker?.symbol] || "\\u25cf") + " ";
      return mark;
    }
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
    const { color, width, dash } = trace.line;
    const drawn = { x1: 0, x2: "100%", y1: "50%", y2: "50%", stroke: color, "stroke-width": width };
    for (const [name, value] of Object.entries(drawn)) line.setAttribute(name, value);
    line.setAttribute("stroke-dasharray", dashes[dash] || "none");
    line.setAttribute("stroke-opacity", trace.opacity || 1);
    return svg;
  };
  const legend = (place, data) => {
    const named = data.filter(trace => trace.meta && trace.showlegend !== false);
    if (named.length < 2) return;
    for (const trace of named) {
      const button = document.createElement("button");
      button.append(swatch(trace), trace.meta);
      button.onclick = () => {
        const hidden = button.classList.toggle("hidden");
        Plotly.restyle(place, { visible: !hidden }, [data.indexOf(trace)]);
      };
      place.nextElementSibling.append(button);
    }
  };
  const draw = place => {
    const { data, layout: spec } = figures[place.dataset.figure];
    if (!place.data) legend(place, data);
    // plotly draws an axis only if a curve uses it: add a curve without points
    const upper = spec.xaxis2 ? [{ x: [null], y: [null], xaxis: "x2", showlegend: false, hoverinfo: "skip" }] : [];
    return Plotly.react(place, [...data, ...upper], layout(spec), config);
  };

  const near = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  places.forEach(place => near.observe(place));
  addEventListener("beforeprint", () => places.forEach(draw));
  dark.addEventListener("change", () => places.filter(place => place.data).forEach(draw));
})();
"""


def fill(page: str, parts: dict[str, str]) -> str:
    """Replace each %%NAME%% by parts[NAME]; the parts are not scanned again, so they may contain %%."""
    pieces = page.split("%%")  # text and names alternate
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))
