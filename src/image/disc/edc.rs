//! The error detection code of CD-ROM sectors (ECMA-130, 14.3): a CRC-32 with the polynomial
//! (x^16 + x^15 + x^2 + 1)(x^16 + x^2 + x + 1), least significant bit first, from 0, without a final
//! complement, stored little-endian.

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

/// The code of `bytes`.
pub fn edc(bytes: &[u8]) -> u32 {
    let (steps, rest) = bytes.as_chunks::<STEP>();
    let mut code = 0u32;
    for step in steps {
        let head = code.to_le_bytes();
        let mut next = 0;
        for n in 0..STEP {
            let byte = if n < 4 { step[n] ^ head[n] } else { step[n] };
            next ^= TABLES[STEP - 1 - n][usize::from(byte)];
        }
        code = next;
    }
    for byte in rest {
        let [low, ..] = code.to_le_bytes();
        code = (code >> 8) ^ TABLES[0][usize::from(low ^ byte)];
    }
    code
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
        for len in (0..70).chain([2064, 2332]) {
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
