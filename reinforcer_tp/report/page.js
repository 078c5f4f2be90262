// Draws the charts of #numbers with plotly.js, in the colours of the page's CSS variables.
"use strict";
(async () => {
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const touch = matchMedia("(pointer: coarse)");
  const css = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const boxes = new Map(
    numbers.charts.map((chart) => [document.getElementById("chart-" + chart.key), chart]));
  const several = numbers.runs.length > 1;
  const loud = new Set(["resume", "hint", "warning", "stop", "failure", "killed"]);

  function color(trace) {
    const inRuns = several && trace.kind !== "bar";
    return css(inRuns ? "--run" + (trace.color % 8) : "--c" + trace.color);
  }

  function faded(hex, alpha) {
    return hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
  }

  function traceOf(trace) {
    const paint = color(trace);
    const base = {
      type: "scatter", mode: "lines", name: trace.name, x: trace.x, y: trace.y,
      legendgroup: trace.group, line: { color: paint, width: 2, dash: trace.dash },
      hovertemplate: "%{y:.5~g}", connectgaps: false,
    };
    switch (trace.kind) {
      case "raw":
        return { ...base, showlegend: false,
          line: { color: faded(paint, 0.45), width: 1 } };
      case "smooth":
        return { ...base, hoverinfo: "skip", hovertemplate: null,
          line: { ...base.line, width: 2.5 } };
      case "points":
        return { ...base, mode: "lines+markers", marker: { color: paint, size: 6 } };
      case "area":
        return { ...base, stackgroup: "parts", fillcolor: faded(paint, 0.75),
          line: { color: paint, width: 0.5 } };
      case "steps":
        return { ...base, fill: "tozeroy", fillcolor: faded(paint, several ? 0.08 : 0.18),
          line: { ...base.line, shape: "hv" } };
      case "bar":
        return { type: "bar", orientation: "h", name: trace.name, x: trace.x, y: trace.y,
          marker: { color: paint }, hovertemplate: "%{x:.4~g} s" };
      default:
        return base;
    }
  }

  // Saves are ticks at the bottom; what matters more has a line over the whole height.
  function marks() {
    const kinds = new Map();
    for (const event of numbers.events) {
      if (!kinds.has(event.kind)) kinds.set(event.kind, []);
      kinds.get(event.kind).push(event);
    }
    return [...kinds].map(([kind, events]) => ({
      type: "scatter", mode: "markers", yaxis: "y2", showlegend: false, cliponaxis: false,
      name: kind, x: events.map((event) => event.step),
      y: events.map(() => (loud.has(kind) ? 1 : 0)),
      text: events.map((event) => (several ? numbers.runs[event.run] + ": " : "") + event.text),
      marker: { color: css("--" + kind), size: loud.has(kind) ? 8 : 6,
        symbol: loud.has(kind) ? "triangle-down" : "line-ns-open" },
      hovertemplate: "<b>" + kind + "</b> at step %{x}<br>%{text}<extra></extra>",
      hoverlabel: { align: "left" },
    }));
  }

  function shapes() {
    return numbers.events.filter((event) => loud.has(event.kind)).map((event) => ({
      type: "line", xref: "x", yref: "paper", x0: event.step, x1: event.step, y0: 0, y1: 1,
      line: { color: css("--" + event.kind), width: 1, dash: "dot" }, layer: "below",
    }));
  }

  function layoutOf(chart) {
    const grid = { gridcolor: css("--grid"), zerolinecolor: css("--axis"),
      linecolor: css("--axis"), tickcolor: css("--axis"), automargin: true };
    const isSteps = chart.x === "step", isRuns = chart.x === "run";
    const small = narrow.matches;
    const names = chart.traces.filter((trace) => trace.kind !== "raw").length;
    const legend = names > 1 ? 20 * Math.ceil(names / (several || small ? 2 : 4)) : 0;
    const height = isRuns ? 80 + 34 * numbers.runs.length : small ? 230 : 270;
    return {
      autosize: true, height: height + legend,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
      margin: { l: 8, r: 10, t: 10, b: 8 },
      hovermode: isRuns ? "closest" : "x unified", barmode: "stack",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--axis"),
        font: { color: css("--text"), size: small ? 11 : 12 } },
      dragmode: touch.matches ? false : "zoom",
      xaxis: { ...grid,
        rangemode: isSteps ? "normal" : "tozero", showspikes: false,
        hoverformat: isSteps ? ",d" : undefined, unifiedhovertitle:
          isSteps ? { text: "step %{x}" } : undefined, nticks: small ? 5 : 8 },
      yaxis: { ...grid,
        title: isRuns ? undefined : { text: chart.unit, standoff: 6, font: { size: 12 } },
        nticks: 6, exponentformat: "power", autorange: isRuns ? "reversed" : true,
        rangemode: isSteps && !chart.unit.startsWith("share") ? "normal" : "nonnegative" },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      legend: { orientation: "h", x: 0, y: -0.14, yanchor: "top",
        font: { size: small ? 11 : 12 }, bgcolor: "rgba(0,0,0,0)" },
      showlegend: names > 1,
      shapes: isSteps ? shapes() : [],
    };
  }

  const config = { displaylogo: false, responsive: true, displayModeBar: false };

  function draw(box, chart) {
    const traces = chart.traces.map(traceOf);
    if (chart.x === "step") traces.push(...marks());
    return Plotly.react(box, traces, layoutOf(chart), config);
  }

  // All charts over steps show the same steps.
  let isFollowing = false;
  async function follow(source, change) {
    const isReset = change["xaxis.autorange"] === true;
    const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (isFollowing || !(isReset || range.every(Number.isFinite))) return;
    isFollowing = true;
    for (const [box, chart] of boxes) {
      if (box === source || chart.x !== "step") continue;
      await Plotly.relayout(box,
        isReset ? { "xaxis.autorange": true } : { "xaxis.range": range });
    }
    isFollowing = false;
  }

  // The page can be scrolled meanwhile. Timers of a tab in the background may take a minute.
  function pause() {
    const { port1, port2 } = new MessageChannel();
    return new Promise((resolve) => { port1.onmessage = resolve; port2.postMessage(0); });
  }

  async function drawAll() {
    for (const [box, chart] of boxes) {
      await draw(box, chart);
      await pause();
    }
    document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  }

  await drawAll();
  for (const [box, chart] of boxes) {
    if (chart.x === "step") box.on("plotly_relayout", (change) => follow(box, change));
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = String(boxes.size);
})();
