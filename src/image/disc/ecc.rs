//! The error correction code of CD-ROM sectors (ECMA-130, annex A): a product code of P and Q.
//!
//! Its block is the sector without the sync pattern: 24 rows of 86 bytes, two rows that make a
//! codeword of each column (P, (26,24) Reed-Solomon), and 104 bytes that make a codeword of each of
//! 52 diagonals through all 26 rows (Q, (45,43)).  Two bytes side by side are treated alike, so a
//! row is 43 pairs, and diagonal n has in its step j the pair j of row n + j (modulo 26).
//!
//! Whole rows are worked on at a time: the compiler makes vectors of that.

use super::field::{double, logarithm, over, power, third, times};

/// Bytes of a block.
pub const BLOCK: usize = 2340;
/// Bytes of a row, and columns: codewords of P.
const ROW: usize = 86;
/// Rows, with the two of P.
const ROWS: usize = 26;
/// Rows of data.
const DATA_ROWS: usize = 24;
/// Diagonals: codewords of Q.
const DIAGONALS: usize = 52;
/// Bytes that a diagonal goes through.
const STEPS: usize = 43;
/// What Q covers, and where it is.
const Q: usize = ROWS * ROW;
/// Room for a row, and for a step of all diagonals, in whole vectors.
const ROW_WIDE: usize = 96;
const STEP_WIDE: usize = 64;
/// Times that P and Q are gone through in turn.
const MAX_TURNS: usize = 16;

/// A block, to be changed in place.
pub type Block = [u8; BLOCK];

/// Whether a codeword is right, and what tells where it is not: both 0 where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Syndrome {
    sum: u8,
    weighted: u8,
}

impl Syndrome {
    fn is_zero(self) -> bool {
        self.sum | self.weighted == 0
    }
}

/// Two sums over codewords side by side: plain, and weighted by powers of the generator.
struct Sums<const N: usize> {
    plain: [u8; N],
    weighted: [u8; N],
}

impl<const N: usize> Sums<N> {
    fn new() -> Self {
        Self {
            plain: [0; N],
            weighted: [0; N],
        }
    }

    /// Adds the next byte of each codeword.
    #[inline(always)]
    fn add(&mut self, bytes: &[u8; N]) {
        for ((plain, weighted), byte) in self.plain.iter_mut().zip(&mut self.weighted).zip(bytes) {
            *plain ^= byte;
            *weighted = double(*weighted) ^ byte;
        }
    }

    /// The same for the codewords that `mask` has ones for; of others, of which nothing is added.
    #[inline(always)]
    fn add_some(&mut self, bytes: &[u8; N], mask: &[u8; N]) {
        let sums = self.plain.iter_mut().zip(&mut self.weighted);
        for (((plain, weighted), byte), mask) in sums.zip(bytes).zip(mask) {
            let byte = byte & mask;
            *plain ^= byte;
            *weighted ^= ((double(*weighted) ^ *weighted) & mask) ^ byte;
        }
    }

    /// The two bytes that make codeword `n` right, where all others were added.
    fn parity(&self, n: usize) -> [u8; 2] {
        let first = third(self.plain[n] ^ double(double(self.weighted[n])));
        [first, self.plain[n] ^ first]
    }

    fn syndrome(&self, n: usize) -> Syndrome {
        Syndrome {
            sum: self.plain[n],
            weighted: self.weighted[n],
        }
    }

    /// Whether the first `count` codewords are right.
    fn are_zero(&self, count: usize) -> bool {
        let bits = self.plain[..count].iter().zip(&self.weighted[..count]);
        bits.fold(0, |all, (a, b)| all | a | b) == 0
    }
}

/// Sums over the columns of the first `rows` rows.
fn columns(block: &Block, rows: usize) -> Sums<ROW_WIDE> {
    let mut sums = Sums::new();
    for row in 0..rows {
        // A few bytes of the next row come along, and are looked at by nobody.
        if let Some(wide) = block[row * ROW..].first_chunk() {
            sums.add(wide);
        }
    }
    sums
}

/// Sums over the diagonals, without the bytes of Q; see [`slot`] for their order.
///
/// All diagonals are gone through at once, a row at a time: diagonal n begins in row n, and is at
/// pair t - n of row t (modulo 26) when t rows are behind.  So the last diagonal stands first, and
/// what they are at lies side by side.
fn diagonals(block: &Block) -> Sums<STEP_WIDE> {
    // Zeroes on both sides, for diagonals that have not begun, or are through.
    let mut rows = [[0u8; PAD + ROW + STEP_WIDE]; ROWS];
    for (row, bytes) in rows.iter_mut().zip(block[..Q].chunks_exact(ROW)) {
        row[PAD..PAD + ROW].copy_from_slice(bytes);
    }
    let mut sums = Sums::new();
    for t in 0..STEPS {
        if let Some(wide) = rows[t % ROWS][2 * t..].first_chunk() {
            sums.add(wide);
        }
    }
    for (t, mask) in (STEPS..).zip(&UNDER_WAY) {
        if let Some(wide) = rows[t % ROWS][2 * t..].first_chunk() {
            sums.add_some(wide, mask);
        }
    }
    sums
}

/// Bytes before a row, of diagonals that have not begun.
const PAD: usize = 2 * (ROWS - 1);

/// `UNDER_WAY[t]`: which diagonals are not through when t rows more than [`STEPS`] are behind.
static UNDER_WAY: [[u8; STEP_WIDE]; ROWS - 1] = under_way();

const fn under_way() -> [[u8; STEP_WIDE]; ROWS - 1] {
    let mut masks = [[0; STEP_WIDE]; ROWS - 1];
    let mut t = 0;
    while t < ROWS - 1 {
        let mut byte = 0;
        while byte < 2 * (ROWS - 1 - t) {
            masks[t][byte] = 0xff;
            byte += 1;
        }
        t += 1;
    }
    masks
}

/// Where the sums of a diagonal stand: those that begin in the last row first.
fn slot(diagonal: usize) -> usize {
    2 * (ROWS - 1 - diagonal / 2) + diagonal % 2
}

/// Sums over whole diagonals.
fn whole_diagonals(block: &Block) -> Sums<STEP_WIDE> {
    let mut sums = diagonals(block);
    for parity in block[Q..].chunks_exact(DIAGONALS) {
        let mut wide = [0; STEP_WIDE];
        let (pairs, _) = parity.as_chunks::<2>();
        for (slot, pair) in wide[..DIAGONALS]
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(pairs.iter().rev())
        {
            *slot = *pair;
        }
        sums.add(&wide);
    }
    sums
}

/// How many codewords of both codes are right.
pub fn right_words(block: &Block) -> usize {
    let of = |code: Code| code.syndromes(block).iter().filter(|s| s.is_zero()).count();
    of(Code::P) + of(Code::Q)
}

/// Whether P is right.
pub fn p_is_right(block: &Block) -> bool {
    columns(block, ROWS).are_zero(ROW)
}

/// Whether Q is right.
pub fn q_is_right(block: &Block) -> bool {
    whole_diagonals(block).are_zero(DIAGONALS)
}

/// Makes P and Q for the rows of data.
pub fn make(block: &mut Block) {
    let sums = columns(block, DATA_ROWS);
    for n in 0..ROW {
        let [first, second] = sums.parity(n);
        block[DATA_ROWS * ROW + n] = first;
        block[(DATA_ROWS + 1) * ROW + n] = second;
    }
    make_q(block);
}

/// Makes Q for what it covers.
fn make_q(block: &mut Block) {
    let sums = diagonals(block);
    for n in 0..DIAGONALS {
        let [first, second] = sums.parity(slot(n));
        block[Q + n] = first;
        block[Q + DIAGONALS + n] = second;
    }
}

/// Which of the two codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    P,
    Q,
}

/// When one byte is believed to be the wrong one of a codeword: more may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Where the codeword of the other code that it is in is wrong too.
    Careful,
    /// Always.
    Bold,
}

impl Code {
    /// Bytes of a codeword.
    fn len(self) -> usize {
        match self {
            Self::P => ROWS,
            Self::Q => STEPS + 2,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::P => Self::Q,
            Self::Q => Self::P,
        }
    }

    /// Where in the block byte `position` of codeword `word` is.
    fn at(self, word: usize, position: usize) -> usize {
        match self {
            Self::P => word + ROW * position,
            Self::Q if position < STEPS => {
                ((word / 2 + position) % ROWS) * ROW + 2 * position + word % 2
            }
            Self::Q => Q + (position - STEPS) * DIAGONALS + word,
        }
    }

    /// The codeword that has the byte at `at` of the block; P has none of Q's.
    fn word(self, at: usize) -> Option<usize> {
        match self {
            Self::P => (at < Q).then_some(at % ROW),
            Self::Q if at >= Q => Some((at - Q) % DIAGONALS),
            Self::Q => {
                let (row, pair) = (at / ROW, at % ROW / 2);
                Some((row + 2 * ROWS - pair) % ROWS * 2 + at % 2)
            }
        }
    }

    fn syndromes(self, block: &Block) -> Vec<Syndrome> {
        match self {
            Self::P => {
                let sums = columns(block, ROWS);
                (0..ROW).map(|n| sums.syndrome(n)).collect()
            }
            Self::Q => {
                let sums = whole_diagonals(block);
                (0..DIAGONALS).map(|n| sums.syndrome(slot(n))).collect()
            }
        }
    }

    /// Which of its codewords are wrong.
    fn wrong(self, block: &Block) -> Vec<bool> {
        self.syndromes(block).iter().map(|s| !s.is_zero()).collect()
    }

    /// Corrects codewords of which one byte is wrong; whether any was.
    fn correct_one(self, block: &mut Block, how: How) -> bool {
        let mut any = false;
        let others = match how {
            How::Careful => self.other().wrong(block),
            How::Bold => vec![true; ROW.max(DIAGONALS)],
        };
        for (word, syndrome) in self.syndromes(block).into_iter().enumerate() {
            let locator = over(syndrome.weighted, syndrome.sum).and_then(logarithm);
            let position = locator.and_then(|n| (self.len() - 1).checked_sub(n));
            let Some(at) = position.map(|position| self.at(word, position)) else {
                continue;
            };
            if self.other().word(at).is_none_or(|word| others[word]) {
                block[at] ^= syndrome.sum;
                any = true;
            }
        }
        any
    }

    /// Corrects codewords that have two wrong bytes at most if all of them are where a codeword of
    /// the other code is wrong too; whether any was.
    fn correct_two(self, block: &mut Block) -> bool {
        let others = self.other().wrong(block);
        let is_suspect = |at| self.other().word(at).is_none_or(|word| others[word]);
        let mut any = false;
        for (word, syndrome) in self.syndromes(block).into_iter().enumerate() {
            if syndrome.is_zero() {
                continue;
            }
            let positions = (0..self.len()).filter(|p| is_suspect(self.at(word, *p)));
            // The bytes of Q itself have no other code: they are believed where others are
            // suspects.
            let positions: Vec<usize> = match self {
                Self::P => positions.collect(),
                Self::Q => positions.filter(|p| *p < STEPS).collect(),
            };
            if let [one, two] = *positions {
                any |= self.solve(block, word, syndrome, [one, two]);
            }
        }
        any
    }

    /// Sets two bytes so that the codeword is right.
    fn solve(self, block: &mut Block, word: usize, syndrome: Syndrome, two: [usize; 2]) -> bool {
        let [x, y] = two.map(|position| power(self.len() - 1 - position));
        let Some(first) = over(syndrome.weighted ^ times(y, syndrome.sum), x ^ y) else {
            return false;
        };
        block[self.at(word, two[0])] ^= first;
        block[self.at(word, two[1])] ^= first ^ syndrome.sum;
        true
    }
}

/// Corrects what it can by `first` and the other code in turn; all blocks on the way in which every
/// codeword is right are added to `found`.
fn correct_from(first: Code, how: How, block: &Block, found: &mut Vec<Block>) {
    let mut block = *block;
    for _ in 0..MAX_TURNS {
        let mut any = false;
        for code in [first, first.other()] {
            any |= code.correct_one(&mut block, how);
            if !p_is_right(&block) {
                continue;
            }
            if q_is_right(&block) {
                found.push(block);
                return;
            }
            // The bytes of Q are in no other codewords: where the rest is right they follow from
            // it.
            let mut remade = block;
            make_q(&mut remade);
            if found.last() != Some(&remade) {
                found.push(remade);
            }
        }
        if !any && !first.correct_two(&mut block) && !first.other().correct_two(&mut block) {
            return;
        }
    }
}

/// Blocks that this one may have been before it was damaged: all codewords are right in each.  More
/// bytes may have been wrong than the code can tell, so another code has to confirm it.
pub fn correct(block: &Block) -> impl Iterator<Item = Block> + use<> {
    let block = *block;
    // One after the other: the first is hardly ever wrong.
    let ways = [How::Careful, How::Bold].into_iter();
    let ways = ways.flat_map(|how| [Code::P, Code::Q].map(|first| (first, how)));
    ways.flat_map(move |(first, how)| {
        let mut found = Vec::new();
        correct_from(first, how, &block, &mut found);
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(code: Code) -> usize {
        match code {
            Code::P => ROW,
            Code::Q => DIAGONALS,
        }
    }

    fn random(rng: &mut fastrand::Rng) -> Block {
        let mut block = [0; BLOCK];
        rng.fill(&mut block[..DATA_ROWS * ROW]);
        make(&mut block);
        block
    }

    /// By the definition: sums of products over each codeword.
    fn is_codeword(code: Code, block: &Block, word: usize) -> bool {
        let mut sums = (0, 0);
        for position in 0..code.len() {
            let byte = block[code.at(word, position)];
            sums.0 ^= byte;
            sums.1 ^= times(byte, power(code.len() - 1 - position));
        }
        sums == (0, 0)
    }

    #[test]
    fn what_is_made_is_right_by_the_definition_of_the_code() {
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..20 {
            let mut block = random(&mut rng);
            for code in [Code::P, Code::Q] {
                assert!((0..words(code)).all(|word| is_codeword(code, &block, word)));
            }
            assert!(p_is_right(&block) && q_is_right(&block));
            let at = rng.usize(0..BLOCK);
            block[at] ^= rng.u8(1..);
            assert_eq!(p_is_right(&block), at >= Q, "{at}");
            assert!(!q_is_right(&block), "{at}");
        }
    }

    #[test]
    fn every_byte_is_in_the_codewords_that_say_they_have_it() {
        for code in [Code::P, Code::Q] {
            let mut seen = [0; BLOCK];
            for word in 0..words(code) {
                for position in 0..code.len() {
                    let at = code.at(word, position);
                    seen[at] += 1;
                    assert_eq!(code.word(at), Some(word), "{code:?} {at}");
                }
            }
            let covered = if code == Code::P { Q } else { BLOCK };
            assert!(seen[..covered].iter().all(|n| *n == 1));
            assert!(seen[covered..].iter().all(|n| *n == 0));
        }
    }

    #[test]
    fn a_burst_of_as_many_bytes_as_a_row_is_corrected() {
        let mut rng = fastrand::Rng::with_seed(3);
        for len in [1, 2, 43, 86] {
            for _ in 0..50 {
                let right = random(&mut rng);
                let mut wrong = right;
                let start = rng.usize(0..DATA_ROWS * ROW - len);
                for byte in &mut wrong[start..start + len] {
                    *byte ^= rng.u8(1..);
                }
                assert!(
                    correct(&wrong).any(|found| found == right),
                    "{len} at {start}"
                );
            }
        }
    }

    #[test]
    fn what_is_beyond_the_code_is_not_called_right_with_codewords_that_are_wrong() {
        let mut rng = fastrand::Rng::with_seed(4);
        for _ in 0..200 {
            let mut wrong = random(&mut rng);
            for _ in 0..rng.usize(60..600) {
                wrong[rng.usize(0..BLOCK)] = rng.u8(..);
            }
            for found in correct(&wrong) {
                assert!(p_is_right(&found) && q_is_right(&found));
            }
        }
    }
}
