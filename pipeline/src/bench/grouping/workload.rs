//! Prompts as users send them, in token ids: what they share and how long they are, drawn from a seed.
//!
//! Texts are random tokens, since grouping looks at nothing but what is equal. All arrive shuffled.

use super::Prompt;

pub(super) const VOCAB_SIZE: u32 = 32_000;
/// What a small model's cache holds by default.
const KV_CACHE_TOKENS: u64 = 16_384;
const TEMPLATE_LEN: usize = 331;

pub(super) struct Workload {
    pub name: &'static str,
    pub prompts: Vec<Prompt>,
    /// The KV cache holds a tenth of the distinct tokens.
    pub is_tight: bool,
}

impl Workload {
    pub(super) fn kv_cache_tokens(&self, distinct_tokens: u64) -> u64 {
        if self.is_tight { distinct_tokens / 10 } else { KV_CACHE_TOKENS }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn text(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(VOCAB_SIZE as usize) as u32).collect()
    }

    fn text_between(&mut self, first: usize, last: usize) -> Vec<u32> {
        let len = first + self.below(last - first + 1);
        self.text(len)
    }

    fn shuffle(&mut self, prompts: &mut [Prompt]) {
        for end in (1..prompts.len()).rev() {
            prompts.swap(end, self.below(end + 1));
        }
    }
}

fn join(parts: &[&[u32]]) -> Prompt {
    parts.concat().into()
}

/// One template over articles.
pub(super) fn template(num_articles: usize) -> Workload {
    let mut random = Random(1);
    let template = random.text(TEMPLATE_LEN);
    let prompts = (0..num_articles).map(|_| join(&[&template, &random.text_between(300, 500)])).collect();
    Workload { name: "(a) a template over articles", prompts, is_tight: false }
}

/// Five questions over each article, article first.
pub(super) fn questions(num_articles: usize) -> Workload {
    let mut random = Random(2);
    let mut prompts = Vec::new();
    for _ in 0..num_articles {
        let article = random.text_between(300, 500);
        (0..5).for_each(|_| prompts.push(join(&[&article, &random.text_between(20, 40)])));
    }
    random.shuffle(&mut prompts);
    Workload { name: "(b) five questions over each article", prompts, is_tight: false }
}

/// Three levels of prefixes, six below each, and four short documents below each of the last.
pub(super) fn three_levels() -> Workload {
    let mut random = Random(3);
    let mut prompts = Vec::new();
    for _ in 0..6 {
        let first = random.text(400);
        for _ in 0..6 {
            let second = random.text_between(150, 250);
            for _ in 0..6 {
                let third = random.text_between(60, 140);
                for _ in 0..4 {
                    prompts.push(join(&[&first, &second, &third, &random.text_between(40, 80)]));
                }
            }
        }
    }
    random.shuffle(&mut prompts);
    Workload { name: "(c) three levels, a tenth of the cache", prompts, is_tight: true }
}

/// Prompts of 750 tokens: under one template, five to an article, three levels deep, and alone.
pub(super) fn long_queue(num_prompts: usize) -> Vec<Prompt> {
    let mut random = Random(4);
    let template = random.text(TEMPLATE_LEN);
    let mut article = Vec::new();
    let levels: Vec<Vec<u32>> = (0..110).map(|_| random.text(200)).collect();
    let mut prompts: Vec<Prompt> = (0..num_prompts)
        .map(|index| {
            if index % 20 == 0 {
                article = random.text(700);
            }
            let mut token_ids = match index % 4 {
                0 => template.clone(),
                1 => article.clone(),
                2 => {
                    let (first, second) = (random.below(10), random.below(10));
                    [levels[first].as_slice(), &levels[10 + first * 10 + second]].concat()
                }
                _ => Vec::new(),
            };
            token_ids.extend(random.text(750 - token_ids.len()));
            token_ids.into()
        })
        .collect();
    random.shuffle(&mut prompts);
    prompts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queued_prompts_have_one_length() {
        let prompts = long_queue(100);
        assert!(prompts.iter().all(|prompt| prompt.len() == 750));
    }
}
