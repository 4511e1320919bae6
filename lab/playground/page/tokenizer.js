"use strict";
// Text as tokens and back: UTF-8 bytes, or byte pairs (BPE) of a tokenizer.json.

// A decoder of one text: each call takes a token and returns the characters that it completes.
function decoderOf(tokenizer) {
  const utf8 = new TextDecoder("utf-8", {ignoreBOM: true});
  return id => utf8.decode(tokenizer.bytes(id), {stream: true});
}

class ByteTokenizer {
  encode(text) {
    return [...new TextEncoder().encode(text)];
  }
  bytes(id) {
    return Uint8Array.of(id);
  }
}

class BytePairTokenizer {
  // Words of byte-level BPE, which are encoded one by one.
  static words = new RegExp(
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+", "gu");

  constructor({model}) {
    this.ids = new Map(Object.entries(model.vocab));
    this.names = new Map([...this.ids].map(([name, id]) => [id, name]));
    const pairs = model.merges.map(merge => typeof merge === "string" ? merge.split(" ") : merge);
    this.ranks = new Map(pairs.map((pair, rank) => [pair.join(" "), rank]));
    // the vocabulary writes every byte as a visible character: itself, or one from 256 on
    this.characters = [];
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      this.characters.push(String.fromCharCode(visible ? byte : next++));
    }
    this.byteOf = new Map(this.characters.map((character, byte) => [character, byte]));
  }

  encode(text) {
    return (text.match(BytePairTokenizer.words) ?? []).flatMap(word => {
      const parts = [...new TextEncoder().encode(word)].map(byte => this.characters[byte]);
      for (;;) {  // merge the pair that was learned first
        let best = Infinity, place = -1;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
          if (rank < best) [best, place] = [rank, i];
        }
        if (place < 0) return parts.map(part => this.ids.get(part));
        parts.splice(place, 2, parts[place] + parts[place + 1]);
      }
    });
  }

  bytes(id) {
    return Uint8Array.from(this.names.get(id) ?? "", character => this.byteOf.get(character));
  }
}

function tokenizerOf(run) {
  return run.tokenizer === "bytes" ? new ByteTokenizer() : new BytePairTokenizer(run.tokenizer);
}
