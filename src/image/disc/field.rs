//! GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (ECMA-130, annex A).

/// What x^8 comes to.
pub(super) const REDUCED: u8 = 0x1d;

/// `EXP[n]`: the generator to the power of n; twice around, so that sums of two logarithms fit.
static EXP: [u8; 510] = exp();
/// `LOG[b]`: which power of the generator b is; of 0 there is none.
static LOG: [u8; 256] = log();
/// `THIRD[b]`: b divided by 3, the generator plus 1.
static THIRD: [u8; 256] = thirds();

/// Times the generator.
#[inline]
pub(super) const fn double(byte: u8) -> u8 {
    // Zeroes or ones all over, without a branch: one comparison for many bytes at once.
    (byte << 1) ^ (0u8.wrapping_sub(byte >> 7) & REDUCED)
}

const fn exp() -> [u8; 510] {
    let mut exp = [0; 510];
    let mut value = 1;
    let mut n = 0;
    while n < 510 {
        exp[n] = value;
        value = double(value);
        n += 1;
    }
    exp
}

const fn log() -> [u8; 256] {
    let exp = exp();
    let mut log = [0; 256];
    let mut n = 0u8;
    while n < 255 {
        log[exp[n as usize] as usize] = n;
        n += 1;
    }
    log
}

const fn thirds() -> [u8; 256] {
    let mut third = [0; 256];
    let mut byte = 0u8;
    loop {
        third[(double(byte) ^ byte) as usize] = byte;
        if byte == 255 {
            return third;
        }
        byte += 1;
    }
}

/// The generator to the power of `n`, below 255.
pub(super) fn power(n: usize) -> u8 {
    EXP[n % 255]
}

/// Divided by the generator plus 1.
pub(super) fn third(byte: u8) -> u8 {
    THIRD[usize::from(byte)]
}

/// The product.
pub(super) fn times(a: u8, b: u8) -> u8 {
    match (a, b) {
        (0, _) | (_, 0) => 0,
        _ => EXP[usize::from(LOG[usize::from(a)]) + usize::from(LOG[usize::from(b)])],
    }
}

/// The quotient; `None` for a divisor of 0.
pub(super) fn over(a: u8, b: u8) -> Option<u8> {
    match (a, b) {
        (_, 0) => None,
        (0, _) => Some(0),
        _ => {
            let (a, b) = (LOG[usize::from(a)], LOG[usize::from(b)]);
            Some(EXP[usize::from(a) + 255 - usize::from(b)])
        }
    }
}

/// Which power of the generator it is; `None` for 0.
pub(super) fn logarithm(byte: u8) -> Option<usize> {
    (byte != 0).then(|| usize::from(LOG[usize::from(byte)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Polynomials multiplied and reduced, bit by bit.
    fn slow(a: u8, b: u8) -> u8 {
        let mut sum = 0;
        let mut a = a;
        for bit in 0..8 {
            if b >> bit & 1 == 1 {
                sum ^= a;
            }
            a = double(a);
        }
        sum
    }

    #[test]
    fn products_and_quotients_are_those_of_the_field() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(times(a, b), slow(a, b));
                assert_eq!(over(times(a, b), b), (b != 0).then_some(a));
            }
            assert_eq!(times(third(a), 3), a);
            assert_eq!(logarithm(a).map(power), (a != 0).then_some(a));
        }
    }
}
