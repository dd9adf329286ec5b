const map = document.getElementById("map"), chooser = document.getElementById("column");
const kept = document.getElementById("kept"), two = Object.keys(DATA.groups).length > 1;

// Named one by one, since some of plotly's own choice send the data to its makers
const BUTTONS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];

function describe(index, card) {
  const row = DATA.cases[index], image = document.createElement("img"), text = document.createElement("div");
  image.src = DATA.pictures[index];
  image.alt = "middle slices of " + row.case;
  const name = text.appendChild(document.createElement("strong"));
  name.textContent = row.case;
  const known = ([key, value]) => key !== "case" && value && value !== row.case && (key !== "group" || two);
  const facts = Object.entries({ ...row, group: DATA.groups[row.group] }).filter(known);
  const line = text.appendChild(document.createElement("div"));
  line.className = "faint";
  line.textContent = facts.map(([k, v]) => v.startsWith(k) ? v : k + " " + v).join(" · ");
  card.replaceChildren(image, text);
}

function keep(index) {
  if (kept.querySelector(`[data-index="${index}"]`)) return;
  const card = document.createElement("div"), close = document.createElement("button");
  card.className = "card";
  card.dataset.index = index;
  describe(index, card);
  close.className = "close";
  close.textContent = "remove";
  close.onclick = () => card.remove();
  card.append(close);
  kept.prepend(card);
}

function show() {
  const column = chooser.value, colors = DATA.columns[column], traces = [];
  const style = getComputedStyle(document.body), [line, faint] = ["--line", "--faint"].map(
    name => style.getPropertyValue(name));
  const name = (label, group) => column === "group" ? DATA.groups[label]
    : (label || "unknown") + (group === "other" ? ` (${DATA.groups.other})` : "");
  for (const group of ["first", "other"]) for (const [label, color] of Object.entries(colors)) {
    const mine = DATA.cases.map((_, i) => i).filter(
      i => DATA.cases[i].group === group && DATA.cases[i][column] === label);
    if (mine.length) traces.push({
      type: "scatter", mode: "markers", name: name(label, group),
      x: mine.map(i => DATA.positions[i][0]), y: mine.map(i => DATA.positions[i][1]), customdata: mine,
      text: mine.map(i => DATA.cases[i].case), hovertemplate: "%{text}<extra></extra>",
      marker: { color, size: 9, opacity: 0.85, symbol: group === "other" ? "diamond-open" : "circle",
                line: { width: group === "other" ? 2 : 0 } },
    });
  }
  const axis = i => ({ title: { text: DATA.axes[i] }, gridcolor: line, zerolinecolor: line });
  Plotly.react(map, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style.color },
    margin: { l: 60, r: 16, t: 16, b: 52 }, xaxis: axis(0), yaxis: axis(1), hovermode: "closest",
    showlegend: traces.length <= 40, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: style.color },
  }, { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons: BUTTONS });
}

for (const name of Object.keys(DATA.columns)) chooser.add(new Option(name));
chooser.value = DATA.column;
chooser.onchange = show;
show();
map.on("plotly_hover", event => describe(event.points[0].customdata, document.getElementById("hover")));
map.on("plotly_click", event => keep(event.points[0].customdata));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
