"use strict"
// What both pages need: nodes, calls to the server, and the labeler's name
const $ = id => document.getElementById(id), query = new URLSearchParams(location.search)
function make(tag, parent, text = "", set = {}) {  // text is text, and never markup
  const node = parent.appendChild(document.createElement(tag))
  node.textContent = text
  for (const [name, value] of Object.entries(set))
    name in node ? node[name] = value : node.setAttribute(name, value)
  return node
}
function visible(text) {  // what would be no sign on the page, such as the start of an escape code, as \x1b
  const code = sign => sign === "\r" ? "\\r" : "\\x" + sign.charCodeAt(0).toString(16).padStart(2, "0")
  return text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, code)
}
function said(parent, text) {  // what a person or a model says, from right to left in Arabic or Hebrew
  return make("div", parent, visible(text), {className: "text", dir: "auto"})
}
function withKeys(node, text) {  // <x> becomes a key
  text.split(/(<[^>]+>)/).forEach((part, i) => i % 2 ? make("kbd", node, part.slice(1, -1)) : node.append(part))
}
function send(path, body) {
  const url = new URL(path, location), headers = {"Content-Type": "application/json"}
  if (query.has("token")) url.searchParams.set("token", query.get("token"))
  return fetch(url, body ? {method: "POST", headers, body: JSON.stringify(body)} : {headers})
}
async function call(path, body) {
  try {
    const reply = await send(path, body)
    return {status: reply.status, ...await reply.json()}
  } catch { return {status: 0, error: "No answer from the server. Is it still running?"} }
}
function signIn(then) {
  const begin = name => {
    $("enter").hidden = true
    $("who").textContent = name.trim()
    try { localStorage.setItem("labeler", name.trim()) } catch {}
    then(name.trim())
  }
  $("enter").onsubmit = event => { event.preventDefault(); if ($("name").value.trim()) begin($("name").value) }
  try { $("name").value = localStorage.getItem("labeler") || "" } catch {}
  if (query.get("labeler")) begin(query.get("labeler"))
  else $("enter").hidden = false, $("name").focus()
}
