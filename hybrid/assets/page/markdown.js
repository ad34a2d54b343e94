// Markdown as elements and text nodes. HTML is shown as it is written, pictures become links, nothing is fetched.

import { button, copyText, make } from "./dom.js";

const DEEPEST = 8; // of what is nested; below it is a text
const LONGEST = 20000; // characters of a paragraph in which marks are looked for
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** Shows a text that grows: only blocks that have changed are made anew. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.sources = [];
  }

  show(text) {
    const sources = blocksOf(text);
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    for (const source of sources.slice(same)) this.element.append(block(source, 0));
    this.sources = sources;
  }
}

/** The blocks of a text, each with its own lines. */
function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const end = endOf(lines, at);
    blocks.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return blocks;
}

/** Where the block ends that begins here. */
function endOf(lines, start) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  if (fence) return fenceEnd(lines, start, fence[1]);
  if (HEADING.test(line) || RULE.test(line)) return start + 1;
  if (ITEM.test(line)) return listEnd(lines, start);
  const quoted = QUOTE.test(line);
  let end = start + 1;
  while (end < lines.length && lines[end].trim()) {
    if (quoted ? !QUOTE.test(lines[end]) : interrupts(lines[end])) break;
    end++;
  }
  return end;
}

function fenceEnd(lines, start, mark) {
  for (let end = start + 1; end < lines.length; end++) {
    const line = lines[end].trim();
    if (line.startsWith(mark) && !line.replaceAll(mark[0], "")) return end + 1;
  }
  return lines.length;
}

function listEnd(lines, start) {
  const first = ITEM.exec(lines[start]);
  const ordered = isOrdered(first[2]);
  let end = start + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (!line.trim()) {
      const next = lines.slice(end).find((other) => other.trim());
      if (next === undefined || !goesOn(next, first[1].length, ordered)) return end;
      end++;
      continue;
    }
    const fence = FENCE.exec(line.trimStart());
    if (fence && indentOf(line) > first[1].length) {
      end = fenceEnd(lines, end, fence[1]);
      continue;
    }
    const blank = !lines[end - 1].trim();
    if (!goesOn(line, first[1].length, ordered) && (blank || interrupts(line))) return end;
    end++;
  }
  return end;
}

function goesOn(line, indent, ordered) {
  const item = ITEM.exec(line);
  if (indentOf(line) > indent) return true;
  return Boolean(item) && !RULE.test(line) && isOrdered(item[2]) === ordered;
}

function interrupts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)])\s+\S/.test(line);
}

function isOrdered(mark) {
  return /\d/.test(mark);
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function block(source, depth) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence[1], fence[2].trim());
  const heading = HEADING.exec(lines[0]);
  if (heading) return filled(make(`h${Math.min(6, heading[1].length + 2)}`), heading[2] ?? "");
  if (RULE.test(lines[0])) return make("hr");
  if (depth < DEEPEST && ITEM.test(lines[0])) return list(lines, depth);
  if (depth < DEEPEST && QUOTE.test(lines[0])) {
    const inner = lines.map((line) => line.replace(QUOTE, "")).join("\n");
    return make("blockquote", {}, ...blocksOf(inner).map((one) => block(one, depth + 1)));
  }
  if (lines.length > 1 && lines[0].includes("|") && DELIMITERS.test(lines[1]) && lines[1].includes("-")) return table(lines);
  return filled(make("p"), source.trim());
}

function code(lines, mark, language) {
  const last = lines.at(-1).trim();
  const closed = lines.length > 1 && last.startsWith(mark) && !last.replaceAll(mark[0], "");
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const name = language.split(/\s/)[0];
  const copy = button("Copy", (event) => copyText(text, event.currentTarget), { "aria-label": "Copy this code" });
  const shown = make("pre", { tabindex: "0" }, make("code", {}, text));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, name), copy), shown);
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = isOrdered(mark);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    const begins = item && item[1].length <= indent.length && isOrdered(item[2]) === ordered;
    if (begins) items.push([item[3] ?? ""]);
    else items.at(-1).push(line);
  }
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  const made = make(ordered ? "ol" : "ul", start === 1 ? {} : { start });
  for (const item of items) made.append(listItem(item, depth));
  return made;
}

function listItem([first, ...rest], depth) {
  const indents = rest.filter((line) => line.trim()).map(indentOf);
  const less = Math.min(...indents, 8);
  const text = [first, ...rest.map((line) => line.slice(Math.min(less, indentOf(line))))].join("\n");
  const task = /^\[([ xX])\]\s+/.exec(text);
  const blocks = blocksOf(task ? text.slice(task[0].length) : text).map((one) => block(one, depth + 1));
  const tight = !rest.some((line) => !line.trim());
  const nodes = tight ? blocks.flatMap((node) => (node.tagName === "P" ? [...node.childNodes] : [node])) : blocks;
  const done = task && make("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "done" });
  return make("li", task ? { class: "task" } : {}, done, ...nodes);
}

function table(lines) {
  const rows = lines.filter((_, index) => index !== 1).map(cells);
  const aligned = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "end") : null));
  const row = (texts, tag) =>
    make("tr", {}, ...aligned.map((side, index) => filled(make(tag, { class: side }), texts[index] ?? "")));
  const [head, ...body] = rows;
  const made = make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...body.map((one) => row(one, "td"))));
  return make("div", { class: "table", tabindex: "0" }, made);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function filled(element, text) {
  element.append(...inline(text, 0));
  return element;
}

const MARKS = /[\\`*_~![<\n]|https?:\/\//g;

/** The nodes of a text within a block. */
function inline(text, depth) {
  if (depth > DEEPEST || text.length > LONGEST) return [text];
  const nodes = [];
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    MARKS.lastIndex = at;
    const mark = MARKS.exec(text);
    if (!mark) {
      plain += text.slice(at);
      break;
    }
    plain += text.slice(at, mark.index);
    const found = span(text, mark.index, depth);
    if (!found) plain += text[mark.index];
    else if (typeof found[0] === "string") plain += found[0];
    else put(found[0]);
    at = found ? found[1] : mark.index + 1;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** What a mark begins, and where it ends; null if it is a character like any other. */
function span(text, at, depth) {
  switch (text[at]) {
    case "\n":
      return [make("br"), at + 1];
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") && !/[()[\]]/.test(text[at + 1]) ? [text[at + 1], at + 2] : null;
    case "`":
      return codeSpan(text, at);
    case "!":
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
    case "[":
      return link(text, at, depth);
    case "<":
      return angle(text, at);
    case "h":
      return bare(text, at);
    default:
      return emphasis(text, at, depth);
  }
}

function codeSpan(text, at) {
  const mark = /^`+/.exec(text.slice(at, at + 50))[0];
  let end = text.indexOf(mark, at + mark.length);
  while (end >= 0 && text[end + mark.length] === "`") {
    while (text[end] === "`") end++;
    end = text.indexOf(mark, end);
  }
  if (end < 0) return [mark, at + mark.length];
  const inner = text.slice(at + mark.length, end).replaceAll("\n", " ");
  return [make("code", {}, inner.replace(/^ (.+) $/, "$1")), end + mark.length];
}

function emphasis(text, at, depth) {
  const sign = text[at];
  const double = text[at + 1] === sign;
  const triple = double && sign !== "~" && text[at + 2] === sign;
  const mark = sign.repeat(triple ? 3 : double ? 2 : 1);
  const before = text[at - 1] ?? " ";
  const next = text[at + mark.length] ?? " ";
  if (/\s/.test(next) || (sign !== "*" && isWord(before)) || (sign === "~" && !double)) return [mark, at + mark.length];
  const end = closing(text, at + mark.length, mark);
  if (end < 0) return [mark, at + mark.length];
  const inner = inline(text.slice(at + mark.length, end), depth + 1);
  const made = { "~": "del" }[sign] ?? (double ? "strong" : "em");
  const node = make(made, {}, ...inner);
  return [triple ? make("em", {}, node) : node, end + mark.length];
}

/** Where the mark is that closes what begins here; code is passed over. */
function closing(text, from, mark) {
  const sign = mark[0];
  for (let at = from; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "`") at = codeSpan(text, at)[1] - 1;
    else if (text[at] === sign) {
      let end = at;
      while (text[end] === sign) end++;
      const long = end - at;
      const fits = long === mark.length || (mark.length < 3 && long === 3) || long > 3;
      if (fits && !/\s/.test(text[at - 1]) && at > from && !(sign === "_" && isWord(text[end] ?? " "))) {
        return long === 3 && mark.length < 3 ? end - mark.length : at;
      }
      at = end - 1;
    }
  }
  return -1;
}

function isWord(character) {
  return /[\p{L}\p{N}]/u.test(character);
}

function link(text, at, depth) {
  const label = /^\[((?:[^[\]\\]|\\.|\[[^[\]]*\]){0,2000})\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/.exec(
    text.slice(at, at + 5000),
  );
  if (!label) return null;
  const address = safeAddress(label[2]);
  if (!address) return null;
  return [anchor(address, ...(label[1] ? inline(label[1], depth + 1) : [address])), at + label[0].length];
}

function angle(text, at) {
  const found = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/.exec(text.slice(at, at + 2010));
  const address = found && safeAddress(found[1]);
  if (address) return [anchor(address, found[1]), at + found[0].length];
  const broken = /^<br\s*\/?>/i.exec(text.slice(at, at + 8));
  return broken ? [make("br"), at + broken[0].length] : null;
}

function bare(text, at) {
  const found = /^https?:\/\/[^\s<>"'`*]{1,2000}/.exec(text.slice(at, at + 2010));
  if (!found || isWord(text[at - 1] ?? " ")) return null;
  let shown = found[0].replace(/[.,;:!?]+$/, "");
  if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
  const address = safeAddress(shown);
  return address ? [anchor(address, shown), at + shown.length] : null;
}

function safeAddress(text) {
  try {
    const address = new URL(text);
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function anchor(address, ...children) {
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, ...children);
}
