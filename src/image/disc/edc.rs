//! The error detection code of CD-ROM sectors (ECMA-130, 14.3): a CRC-32 from 0, least significant
//! bit first, without a final complement, stored little-endian.  Its polynomial is
//! `(x^16 + x^15 + x^2 + 1)(x^16 + x^2 + x + 1)`.

/// The polynomial with its bits in the order in which they are worked on.
const POLYNOMIAL: u32 = 0xd801_8001;
/// Bytes that are worked on at a time.
const STEP: usize = 16;

/// `TABLES[n][b]`: what byte `b` comes to when `n` bytes follow it.
static TABLES: [[u32; 256]; STEP] = tables();

const fn tables() -> [[u32; 256]; STEP] {
    let mut tables = [[0; 256]; STEP];
    let mut byte = 0u32;
    while byte < 256 {
        let mut value = byte;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ (if value & 1 == 1 { POLYNOMIAL } else { 0 });
            bit += 1;
        }
        tables[0][byte as usize] = value;
        byte += 1;
    }
    let mut n = 1;
    while n < STEP {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[n - 1][byte];
            tables[n][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        n += 1;
    }
    tables
}

/// Bytes at the end of longer ones that are worked on beside those before them.
const TAIL: usize = 1024;

/// `ADVANCE[n][b]`: what byte `n` of a code, if it is `b`, comes to when [`TAIL`] zeroes follow.
static ADVANCE: [[u32; 256]; 4] = advance();

const fn advance() -> [[u32; 256]; 4] {
    let byte_table = tables();
    let mut advance = [[0; 256]; 4];
    let mut bit = 0;
    while bit < 32 {
        let mut code = 1u32 << bit;
        let mut n = 0;
        while n < TAIL {
            code = (code >> 8) ^ byte_table[0][(code & 0xff) as usize];
            n += 1;
        }
        // The code is linear: a byte is the sum of its bits.
        let mut byte = 0;
        while byte < 256 {
            if byte >> (bit % 8) & 1 == 1 {
                advance[bit / 8][byte] ^= code;
            }
            byte += 1;
        }
        bit += 1;
    }
    advance
}

#[inline(always)]
fn step(code: u32, bytes: &[u8; STEP]) -> u32 {
    let head = code.to_le_bytes();
    let mut next = 0;
    for n in 0..STEP {
        let byte = if n < 4 { bytes[n] ^ head[n] } else { bytes[n] };
        next ^= TABLES[STEP - 1 - n][usize::from(byte)];
    }
    next
}

fn finish(code: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(code, |code, byte| {
        let [low, ..] = code.to_le_bytes();
        (code >> 8) ^ TABLES[0][usize::from(low ^ byte)]
    })
}

/// The code of `bytes`.
pub fn edc(bytes: &[u8]) -> u32 {
    let (head, tail) = match bytes.len() {
        // Two at a time: one step has to wait for the one before it.
        len if len >= 2 * TAIL => bytes.split_at(len - TAIL),
        _ => (bytes, &[][..]),
    };
    let (steps, rest) = head.as_chunks::<STEP>();
    let (tail, _) = tail.as_chunks::<STEP>();
    let (beside, alone) = steps.split_at(tail.len());
    let (mut code, mut last) = (0, 0);
    for (one, other) in beside.iter().zip(tail) {
        code = step(code, one);
        last = step(last, other);
    }
    code = alone.iter().fold(code, step);
    code = finish(code, rest);
    match tail.is_empty() {
        true => code,
        false => {
            let bytes = code.to_le_bytes().into_iter().zip(&ADVANCE);
            bytes.fold(last, |sum, (byte, table)| sum ^ table[usize::from(byte)])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the polynomial is written.
    fn slow(bytes: &[u8]) -> u32 {
        bytes.iter().fold(0u32, |code, byte| {
            (0..8).fold(code ^ u32::from(*byte), |code, _| {
                (code >> 1) ^ (if code & 1 == 1 { POLYNOMIAL } else { 0 })
            })
        })
    }

    #[test]
    fn every_length_has_the_code_that_the_polynomial_gives_it() {
        let mut rng = fastrand::Rng::with_seed(1);
        for len in (0..70).chain([1024, 2047, 2048, 2056, 2064, 2332, 5000]) {
            let bytes: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
            assert_eq!(edc(&bytes), slow(&bytes), "{len}");
        }
    }

    #[test]
    fn the_polynomial_is_the_product_of_its_factors() {
        // Most significant bit first, without carries: what x^32 + .. comes to.
        let (a, b) = (0x1_8005u64, 0x1_0007u64);
        let product = (0..17).fold(0, |sum, bit| sum ^ ((a << bit) * (b >> bit & 1)));
        assert_eq!(product, 0x1_8001_801b);
        assert_eq!(0x8001_801bu32.reverse_bits(), POLYNOMIAL);
    }
}
