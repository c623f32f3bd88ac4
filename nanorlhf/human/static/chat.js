"use strict"
let labeler = "", about = null, talk = [], busy = false

// One turn: what was said before it, and its replies, each {id, text, card}
async function say(words) {
  busy = true
  $("send").disabled = true
  const before = about.keeps_turns ? talk.slice() : []
  const messages = [...before, {role: "user", content: words}]
  bubble(words)
  const row = make("div", $("talk"), "", {className: "replies"})
  const order = about.models === 2 && Math.random() < 0.5 ? [1, 0] : [...Array(about.models).keys()]
  const replies = order.map((model, i) => ({model, card: card(row, i)}))
  const done = await Promise.all(replies.map(reply => listen(reply, messages)))
  busy = false
  $("send").disabled = false
  if (!done.every(Boolean)) return false
  talk = [...messages, {role: "assistant", content: replies[0].text}]
  const end = talk.length - 1
  replies.forEach(reply => thumbs(reply))
  if (replies.length === 2) compare(replies, i => {  // the conversation goes on from the better one
    if (talk[end]?.content === replies[1 - i].text) talk[end].content = replies[i].text
  })
  return true
}
function bubble(words) {
  const box = make("section", $("talk"), "", {className: "said"})
  make("h2", box, "You")
  make("div", box, words, {className: "text"})
}
function card(row, i) {
  const name = about.models === 2 ? `Reply ${i + 1}` : "Reply"
  const box = make("article", row, "", {className: "card", "aria-label": name})
  make("h2", box, name)
  make("div", box, "…", {className: "text"})
  return box
}
async function listen(reply, messages) {  // the first line is the id, then comes the text
  const body = {messages, model: reply.model, temperature: Number($("temperature").value)}
  const shown = reply.card.querySelector(".text")
  try {
    const answer = await send("/api/reply", body)
    if (!answer.ok) throw Error((await answer.json()).error)
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    let all = ""
    for (let part; !(part = await reader.read()).done;) {
      all += part.value
      shown.textContent = all.slice(all.indexOf("\n") + 1)
      reply.card.scrollIntoView({block: "nearest"})
    }
    reply.id = all.slice(0, all.indexOf("\n"))
    reply.text = shown.textContent
    if (!reply.text) shown.textContent = "(it says nothing)"
    return true
  } catch (error) {
    shown.textContent = "(no reply)"
    $("alert").textContent = error.message || String(error)
    return false
  }
}
function choice(buttons, ids, then = () => {}) {  // of several buttons one, or by a second click none
  for (const [button, value] of buttons) button.onclick = async () => {
    const answer = button.getAttribute("aria-pressed") === "true" ? null : value
    const kept = await call("/api/judge", {labeler, ids, answer})
    $("alert").textContent = kept.status === 200 ? "" : kept.error
    if (kept.status !== 200) return
    for (const [other, its] of buttons) other.setAttribute("aria-pressed", its === answer)
    if (answer !== null) then(answer)
  }
}
function option(card, text) {
  const row = card.querySelector(".row") || make("div", card, "", {className: "row"})
  return make("button", row, text, {type: "button", "aria-pressed": false})
}
function thumbs(reply) {
  choice([[option(reply.card, "Like"), true], [option(reply.card, "Dislike"), false]], [reply.id])
}
function compare(replies, then) {
  const buttons = replies.map((reply, i) => [option(reply.card, "This one is better"), i])
  choice(buttons, replies.map(reply => reply.id), then)
}
$("say").onsubmit = async event => {
  event.preventDefault()
  const words = $("words").value
  if (busy || !words.trim()) return
  $("words").value = $("alert").textContent = ""
  if (!await say(words)) $("words").value ||= words
  $("words").focus()
}
$("words").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
  event.preventDefault()
  $("say").requestSubmit()
}
$("temperature").oninput = () => { $("degrees").textContent = $("temperature").value }
$("clear").onclick = () => {
  if (busy) return
  talk = []
  $("talk").replaceChildren()
}
signIn(async name => {
  labeler = name
  about = await call("/api/about")
  if (about.status !== 200) return $("alert").textContent = about.error
  $("temperature").value = about.temperature
  $("temperature").oninput()
  $("to").textContent = about.to.join(" and ")
  $("say").hidden = false
  $("words").focus()
})
