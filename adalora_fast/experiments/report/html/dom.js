// Elements made of text: nothing of the data is ever read as HTML.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text. Functions are listeners. */
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(key, value === true ? "" : value);
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Paragraphs and lists of the report's own words: **bold**, *emphasis*, lines that begin with "- ". */
function prose(text) {
  return text.split("\n\n").map((part) => {
    const lines = part.split("\n");
    if (lines.every((line) => line.startsWith("- "))) {
      return element("ul", {}, lines.map((line) => element("li", {}, inline(line.slice(2)))));
    }
    return element("p", {}, inline(part));
  });
}

function inline(text) {
  return text.split(/(\*\*[^*]+\*\*|\*[^*\s][^*]*\*|\\\*)/).map((part) => {
    if (part === "\\*") return "*";
    if (part.length > 4 && part.startsWith("**")) return element("strong", {}, part.slice(2, -2));
    if (part.length > 2 && part.startsWith("*")) return element("em", {}, part.slice(1, -1));
    return part;
  });
}

/** A list of what and its value: short ones side by side, long ones below each other. */
function facts(pairs, kind = "short") {
  return element("dl", { class: `facts ${kind}` },
    pairs.map(([what, value]) => element("div", {}, element("dt", {}, what), element("dd", {}, value))));
}

/** Two decimals and more for small numbers, a true minus, "–" where there is none. */
function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value)) text = value.toLocaleString("en");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en");
  else text = size >= 0.1 ? value.toFixed(2) : value.toPrecision(2);
  return text.replace("-", "−");
}
